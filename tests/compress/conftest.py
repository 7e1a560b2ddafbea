"""A NemotronH of a few layers in which no two weights are alike, so that a wrong slice shows."""

import pytest
import torch
from transformers import NemotronHForCausalLM

from jetlab.models import nemotron, zoo


@pytest.fixture(scope="session")
def small():
    """`small(pattern, **keys)`: a random model; keys are those of `zoo.Shape`."""

    def build(pattern: str = "M-*M-", *, seed: int = 0, vocab_size: int = 37, norm_eps: float = 1e-5, **widths):
        kinds = zoo.layer_kinds(pattern)
        shape = zoo.Shape(
            name="small",
            family="nemotron_h",
            n_layers=len(kinds),
            layer_kinds=kinds,
            vocab_size=vocab_size,
            tied=False,
            gated_mlp=False,
            norms_per_layer=1,
            **{"d_model": 24, "d_ff": 20, "n_heads": 4, "n_kv_heads": 2, "head_dim": 6} | widths,
            linear=zoo.LinearDims(n_heads=6, head_dim=5, head_dim_v=4, n_groups=2),
        )
        torch.manual_seed(seed)
        model = NemotronHForCausalLM(nemotron.config_of(shape, norm_eps=norm_eps, chunk_size=8)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.2 * torch.randn_like(parameter)
        return model

    return build


@pytest.fixture
def rows():
    """Four rows of calibration, two of them padded."""
    from jetlab.compress.calibration import rows_of

    draw = torch.Generator().manual_seed(1)
    return rows_of([torch.randint(37, (n,), generator=draw).tolist() for n in (11, 7, 11, 3)])
