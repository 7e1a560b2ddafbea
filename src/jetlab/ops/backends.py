"""Which implementation a call takes: the definition, plain PyTorch in chunks, or the Triton kernels."""

import functools
import importlib.util
import logging

import torch
from torch import Tensor

BACKENDS = ("reference", "chunked", "triton", "auto")
TRITON_IS_INSTALLED = importlib.util.find_spec("triton") is not None
log = logging.getLogger(__name__)


def resolve_backend(backend: str, *tensors: Tensor | None, head_dim: int = 0, taps: int = 0) -> str:
    """The implementation that a call with `backend` takes.

    "auto" is "triton" where `jetlab_kernels.takes` the call's `tensors`, on a GPU, with keys of `head_dim` channels or a
    convolution of `taps`; everywhere else it is "chunked". It logs what it took, once each.
    Raises ValueError for an unknown name, and ImportError for "triton" where Triton is not installed.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}; use 'auto'")
    if backend == "triton" and not TRITON_IS_INSTALLED:
        raise ImportError(
            "backend='triton' needs Triton, which PyTorch brings along on Linux with CUDA and which is not installed here; "
            "use backend='chunked'"
        )
    if backend != "auto":
        return backend
    chosen = "chunked"
    if tensors and tensors[0].is_cuda and TRITON_IS_INSTALLED:
        from jetlab_kernels import takes

        chosen = "triton" if takes(*tensors, head_dim=head_dim, taps=taps) else "chunked"
    if tensors and not torch.compiler.is_compiling():
        _tell(chosen, tensors[0].device.type)
    return chosen


@functools.cache
def _tell(chosen: str, device: str) -> None:
    log.info("backend='auto' takes %s on %s", chosen, device)
