"""The gate of an MLP (arXiv:2002.05202): y = SiLU(gate) · up, all [..., F]."""

from torch import Tensor
from torch.nn import functional as F

from jetlab.ops.backends import resolve_backend
from jetlab.ops.recurrence import core_dtype


def swiglu(gate: Tensor, up: Tensor, *, backend: str = "auto") -> Tensor:
    """y [..., F] in gate's dtype.

    Backend "triton" is one launch, in fp32 until the end, on a GPU, in bf16, fp16 or fp32; it gives no gradient.
    "reference" is the definition, and "chunked" rounds the SiLU too, as Transformers does.
    Raises ValueError if the shapes differ.
    """
    if gate.shape != up.shape:
        raise ValueError(
            f"gate and up must have one shape, got {list(gate.shape)} and {list(up.shape)}; pass both projections of the same "
            "tokens"
        )
    backend = resolve_backend(backend, gate, up)
    if backend == "reference":
        return swiglu_reference(gate, up)
    if backend == "triton":
        from jetlab_kernels.swiglu import swiglu as kernel

        return kernel(gate, up)
    return F.silu(gate) * up


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The definition in fp32 (fp64 stays fp64)."""
    core = core_dtype(gate, up)
    return (F.silu(gate.to(core)) * up.to(core)).to(gate.dtype)
