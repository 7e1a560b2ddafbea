"""The gate of an MLP in one launch (arXiv:2002.05202): y = SiLU(gate) · up.

Reference: jetlab.ops.swiglu.swiglu_reference.

Shapes: gate, up, y [..., F], taken as N numbers in a row
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from jetlab_kernels.launch import check_device, check_format

TILE = {"BN": 1024, "num_warps": 4}  # 16 bytes of bf16 a thread


@triton.jit
def _swiglu(gate_ptr, up_ptr, y_ptr, N, BN: tl.constexpr):
    """y.  Grid (cdiv(N, BN),): one program owns BN numbers."""
    i = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)  # int64: a prompt's tokens times F pass 2^31
    gate = tl.load(gate_ptr + i, mask=i < N, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + i, mask=i < N, other=0.0).to(tl.float32)
    tl.store(y_ptr + i, (gate * tl.sigmoid(gate) * up).to(y_ptr.dtype.element_ty), mask=i < N)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """y [..., F] in gate's dtype. There is no gradient. The caller has checked that the shapes are one.

    Raises ValueError for a dtype other than bf16, fp16 and fp32, or another device than a GPU's.
    """
    check_device(gate, up)
    for x in (gate, up):
        check_format(x)
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    with torch.cuda.device_of(gate):
        _swiglu[(triton.cdiv(y.numel(), TILE["BN"]),)](gate, up, y, y.numel(), **TILE)
    return y
