"""What every launcher needs: where a kernel can run, what assembles it, and in which precision its products are taken."""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from jetlab_kernels import MAX_HEAD_DIM

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads the same variable when it decorates a kernel
SOUND_PTXAS = (12, 9)


def _release(name: str) -> tuple[int, ...]:
    """Version of an assembler that Triton knows, as numbers; empty if this Triton has none of that name."""
    try:
        return tuple(int(number) for number in getattr(triton.knobs.nvidia, name).version.split("."))
    except (AttributeError, RuntimeError):  # no such knob, or no such file
        return ()


def choose_assembler() -> None:
    """Lets this process assemble for Hopper with the ptxas that Triton brings for Blackwell, where the other one is too old.

    Triton 3.6 and 3.7 bring ptxas 12.8 for Hopper. It gives some of our products an operand's address beyond shared memory:
    on an H100 the same program then reads out of bounds or gives wrong numbers, while 12.9, which Triton 3.6 brings for
    Blackwell, and 13.0 assemble it right (Triton 3.7 brings 13.1, with which our kernels were built but not yet run). The
    choice stands in TRITON_PTXAS_PATH, which Triton reads; one that the user has made stays.
    """
    if "TRITON_PTXAS_PATH" in os.environ or not _release("ptxas") < SOUND_PTXAS <= _release("ptxas_blackwell"):
        return
    triton.knobs.nvidia.ptxas = triton.knobs.nvidia.ptxas_blackwell.path
    from triton.backends.nvidia import compiler

    # The version is part of the name under which a program is kept: one of the old assembler must not be found under it.
    for remembered in (compiler.get_ptxas_version, compiler.CUDABackend.hash):
        if hasattr(remembered, "cache_clear"):
            remembered.cache_clear()


def assembles_right() -> bool:
    """Whether what assembles for Hopper in this process is free of the error above."""
    return _release("ptxas") >= SOUND_PTXAS


choose_assembler()


def check_device(*tensors: Tensor | None) -> None:
    """Raises ValueError unless all tensors lie on one CUDA device, or on any one device under Triton's interpreter, and if
    what assembles the kernels is known to get them wrong."""
    devices = {x.device for x in tensors if x is not None}
    if len(devices) > 1:
        names = ", ".join(sorted(str(device) for device in devices))
        raise ValueError(f"all tensors must lie on one device, got {names}; move them with .to(device)")
    device = devices.pop()
    if device.type != "cuda" and not INTERPRETED:
        raise ValueError(
            f"Triton kernels run on a CUDA device, got tensors on {device}; use backend='chunked' there, or set "
            "TRITON_INTERPRET=1 before Python starts to step through a kernel without a GPU"
        )
    if not INTERPRETED and not assembles_right():
        found = ".".join(map(str, _release("ptxas"))) or "none"
        raise ValueError(
            f"the Triton kernels need ptxas ≥ {'.'.join(map(str, SOUND_PTXAS))}, got {found}: an older one gets them wrong on "
            "Hopper; set TRITON_PTXAS_PATH to a newer one, or use backend='chunked'"
        )


def check_format(x: Tensor) -> None:
    """Raises ValueError unless x is bf16, fp16 or fp32."""
    if x.dtype not in MAX_HEAD_DIM:
        raise ValueError(
            f"Triton kernels take bfloat16, float16 or float32, got {x.dtype}; backend='chunked' and 'reference' keep fp64"
        )


def dot_format(dtype: torch.dtype) -> dict:
    """Keyword arguments of a kernel: the format of a product's factors, and how products of fp32 are taken.

    Three tf32 products stand for one of fp32: plain tf32 keeps 10 bits, which training shows. The interpreter computes
    bf16 as integers, so there the factors are fp32 and bf16 is a format of storage alone.
    """
    if INTERPRETED or dtype == torch.float32:
        return {"DOT": tl.float32, "PRECISION": "tf32x3"}
    return {"DOT": tl.bfloat16 if dtype == torch.bfloat16 else tl.float16, "PRECISION": "tf32"}


def walkable(x: Tensor) -> tuple[Tensor, int]:
    """x [B,T,…,X] and the stride of its tokens, counted through all rows; a copy where a kernel could not walk x as it lies.

    A kernel steps from token to token and reads the last dimension without gaps: a slice of a joint projection passes.
    A dimension of size 1 may have any stride, so with a single token a row the step is that of the rows.
    """
    B, T = x.shape[:2]
    gaps = x.stride(-1) != 1 and x.shape[-1] > 1
    if gaps or (B > 1 and T > 1 and x.stride(0) != T * x.stride(1)):
        x = x.contiguous()
    return x, x.stride(1) if T > 1 else x.stride(0)


def token_strides(x: Tensor) -> tuple[Tensor, int, int]:
    """x [B,T,H,X] as `walkable`, and the stride of its heads too."""
    x, token = walkable(x)
    return x, token, x.stride(2)
