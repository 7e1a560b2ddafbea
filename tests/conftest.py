"""What the tests share: one thread, no network, and tasks of small sizes."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

if not torch.cuda.is_available():  # Triton reads it when it is imported, which any of the libraries may do first
    os.environ["TRITON_INTERPRET"] = "1"
torch.set_num_threads(1)  # small tensors: more threads only wait for each other, and the sums stay the same everywhere


@pytest.fixture(scope="session")
def sizes():
    """Sizes of the tasks at which a context is a few dozen tokens."""
    return {
        "knowledge": {"n_options": 5},
        "math": {"n_names": 6},
        "retrieval": {"n_pairs": 7, "key_words": 1},
        "code": {"n_variables": 5, "writes_per_variable": 1.6},
        "recency": {"n_pairs": 4, "n_distractors": 7},
        "patterns": {"n_records": 5},
        "chain": {"n_names": 4, "n_changes": 2},
    }


@pytest.fixture(scope="session")
def tasks(sizes):
    """All tasks at these sizes, by name."""
    from jetlab.tasks import build_tasks

    return build_tasks(sizes)


@pytest.fixture(scope="session")
def tokenizer():
    """The bundled teachers' tokeniser."""
    from jetlab.data.tokenizer import build_tokenizer

    return build_tokenizer()
