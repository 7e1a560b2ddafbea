"""Triton kernels of the study, one file an op."""

import torch

# Whether backend="auto" leaves to them what they take. They have not been measured on a GPU yet: a record there that shows
# every one right, and faster than plain PyTorch, turns this on.
AUTO = False
# Key channels of a head, all of which a program holds in registers and shared memory; value channels come in blocks.
MAX_HEAD_DIM = {torch.float32: 128, torch.float16: 256, torch.bfloat16: 256}
MAX_TAPS = 8


def takes(*tensors: torch.Tensor | None, head_dim: int = 0, taps: int = 0) -> bool:
    """Whether "auto" is right to call the kernels: on one GPU, in bf16, fp16 or fp32, at widths that they hold."""
    given = [x for x in tensors if isinstance(x, torch.Tensor)]
    formats = all(x.dtype in MAX_HEAD_DIM for x in given)
    return (
        AUTO
        and formats
        and all(x.is_cuda for x in given)
        and head_dim <= MAX_HEAD_DIM[given[0].dtype]
        and taps <= MAX_TAPS
    )
