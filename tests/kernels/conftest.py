"""Where the kernels run: on the GPU if there is one, else under Triton's interpreter on the CPU, at sizes that it bears."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton has wheels for Linux alone")


@pytest.fixture(scope="session")
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Every tensor that a launcher allocates begins as NaN: a number that no kernel wrote shows."""

    def fill(allocate):
        return lambda *size, **options: allocate(*size, **options).fill_(torch.nan)

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, fill(getattr(torch, name)))
