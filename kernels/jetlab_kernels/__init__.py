"""Triton kernels of the study, one file an op."""

import torch

# Compute capability of the GPU on which all of them were found right in bf16, fp16 and fp32 (tests/kernels on an H100) and, in
# bf16, faster than plain PyTorch (records/h100/kernels). On others they were not tried, and tiles that fill a Hopper's shared
# memory may find no room.
CHECKED_ON = (9, 0)
# Key channels of a head, all of which a program holds in registers and shared memory; value channels come in blocks.
MAX_HEAD_DIM = {torch.float32: 128, torch.float16: 256, torch.bfloat16: 256}
MAX_TAPS = 8


def takes(*tensors: torch.Tensor | None, head_dim: int = 0, taps: int = 0) -> bool:
    """Whether "auto" is right to call the kernels: on a GPU where they were checked, in bf16, fp16 or fp32, at widths that
    they hold; not while torch.compile traces, where they were not tried."""
    given = [x for x in tensors if isinstance(x, torch.Tensor)]
    if torch.compiler.is_compiling() or not given or not all(x.is_cuda and x.dtype in MAX_HEAD_DIM for x in given):
        return False
    if torch.cuda.get_device_capability(given[0].device) != CHECKED_ON:
        return False
    from jetlab_kernels.launch import assembles_right

    return assembles_right() and head_dim <= MAX_HEAD_DIM[given[0].dtype] and taps <= MAX_TAPS
