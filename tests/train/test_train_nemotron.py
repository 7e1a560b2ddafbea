"""The small NemotronH: its shape follows its section, training lowers the loss, and folders load with the Auto classes."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from jetlab import run
from jetlab.config import Nano2Study, NemotronTraining
from jetlab.data.tokenizer import build_tokenizer
from jetlab.models import nemotron as shapes
from jetlab.paths import ROOT
from jetlab.train import nemotron

PARAMS = run.read_params(ROOT / "params.yaml")
SMALL = PARAMS["nano2"]["training"] | {
    "layers": "M-*",
    "d_model": 16,
    "d_ff": 24,
    "mamba_heads": 4,
    "mamba_head_dim": 4,
    "state_size": 4,
    "head_dim": 8,
    "sizes": PARAMS["nano2"]["training"]["sizes"] | {"retrieval": {"n_pairs": 8, "key_words": 1}},
    "phases": [
        {"name": name, "n_steps": 20, "muon_learning_rate": 2e-2, "growth": 0.0, "rows": {"retrieval": 2}}
        for name in ("first", "second")
    ],
    "warmup": 2,
}


def training(**changes):
    return NemotronTraining.from_params(**SMALL | changes)


def trained(tmp_path, seed=0):
    return ROOT / nemotron.train_into(tmp_path / str(seed), training(), 64, seed=seed, device="cpu")


def test_training_lowers_the_loss_and_leaves_a_folder_like_any_other(tmp_path):
    folder = trained(tmp_path)
    lines = (folder / "loss.csv").read_text().splitlines()
    assert lines[0] == "phase,step,loss"
    rows = [line.split(",") for line in lines[1:]]
    assert [row[:2] for row in rows] == [["first", "20"], ["second", "40"]]
    assert float(rows[1][2]) < float(rows[0][2])
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__ == "NemotronHForCausalLM"
    assert shapes.layer_string(shapes.shape_of(model.config).layer_kinds) == "M-*"
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == build_tokenizer().get_vocab()


def test_the_seed_decides_the_weights(tmp_path):
    runs = (("one", 0), ("again", 0), ("other", 1))
    one, again, other = (load_file(trained(tmp_path / name, seed) / "model.safetensors") for name, seed in runs)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_the_bundled_ones_have_the_shape_of_their_section():
    section = NemotronTraining.from_params(**PARAMS["nano2"]["training"])
    for i in (0, 1):
        model = AutoModelForCausalLM.from_pretrained(ROOT / f"assets/nemotron/{i}")
        wanted = nemotron.small_config(section, build_tokenizer())
        assert shapes.shape_of(model.config) == shapes.shape_of(wanted)
        assert model.config.chunk_size == wanted.chunk_size
    size = sum(file.stat().st_size for file in (ROOT / "assets/nemotron").rglob("*"))
    assert size < 8_000_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": "M-Q*"}, r"got 'M-Q\*' with Q"),
        ({"mamba_heads": 5}, "multiple of the 2 groups .* got 5; try 4"),
        ({"n_heads": 3}, "multiple of the 2 key-value heads, got 3"),
    ],
)
def test_a_shape_that_does_not_fit_together_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        nemotron.small_config(training(**change), build_tokenizer())


def test_bundled_folders_are_named_and_trained_ones_are_written(tmp_path, monkeypatch):
    sections = {"common": PARAMS["common"], "tasks": PARAMS["tasks"]}
    study = Nano2Study.from_params(**sections, **PARAMS["nano2"] | {"n_models": 2})
    assert nemotron.provide(study, tmp_path) == ["assets/nemotron/0", "assets/nemotron/1"]
    study = Nano2Study.from_params(**sections, **PARAMS["nano2"] | {"source": "train", "training": SMALL})
    (folder,) = nemotron.provide(study, tmp_path)
    assert folder == str(tmp_path / "nemotron" / "0")
    assert AutoModelForCausalLM.from_pretrained(folder).config.hidden_size == 16
