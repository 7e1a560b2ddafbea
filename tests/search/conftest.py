"""What the tests of the search share: a supernet study that trains in a second."""

import pytest

from jetlab.config import SupernetStudy


@pytest.fixture(scope="session")
def base(sizes):
    tasks = {
        "seq_len": 40, "sizes": sizes, "n_contexts": {"search": 2, "select": 1, "test": 2}, "n_questions": 2,
    }  # fmt: skip
    training = {
        "n_local": 3, "n_steps": 5, "learning_rate": 3e-3, "warmup": 2, "feature_weight": 2.0, "logit_weight": 1.0,
        "rows": {"retrieval": 1}, "weights": {}, "growth": 0.4,
    }  # fmt: skip
    return SupernetStudy.from_params(
        common={"seed": 0, "n_threads": 1, "path": "paper", "device": "cpu"}, tasks=tasks, block="gated_deltanet",
        dims={"n_heads": 2, "head_dim": 8, "head_dim_v": 8}, n_seeds=1, law="up_to_k", max_full=2, n_checks=2,
        check_budget=0, training=training,
    )  # fmt: skip
