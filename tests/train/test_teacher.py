"""Specification of the teacher's training: it learns, and the same seed gives the same bits."""

import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

from jetlab.data.packing import Mixture
from jetlab.models import surgery
from jetlab.paths import ROOT
from jetlab.train.loop import Resume
from jetlab.train.teacher import take_over, teacher_config, train_teacher


def train(tasks, tokenizer, n_steps=40, seed=0, **options):
    config = teacher_config(
        vocab_size=len(tokenizer), d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=32, pad_token_id=0
    )
    mixture = Mixture(tasks, {"retrieval": 4, "text": 1}, tokenizer, 48, seed)
    return train_teacher(
        config, mixture, seed=seed, n_steps=n_steps, learning_rate=1e-2, muon_learning_rate=1e-2, warmup=5,
        weights={"text": 0.5}, growth=0.4, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(tasks, tokenizer):
    return train(tasks, tokenizer)


def test_a_few_steps_lower_the_loss(run):
    _, history = run
    assert [row["step"] for row in history] == [20, 40]
    assert history[-1]["loss"] < history[0]["loss"] - 0.3


def test_the_same_seed_gives_the_same_bits_whatever_ran_before(run, tasks, tokenizer):
    torch.rand(7)
    model, history = train(tasks, tokenizer)
    assert history == run[1]
    for (name, a), b in zip(model.state_dict().items(), run[0].state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_another_seed_gives_another_teacher(run, tasks, tokenizer):
    _, history = train(tasks, tokenizer, n_steps=20, seed=1)
    assert history[0]["loss"] != run[1][0]["loss"]


def test_the_model_comes_back_ready_to_use(run):
    model, _ = run
    assert not model.training and model.device.type == "cpu"
    assert model.config.eos_token_id == 1 and model.config.tie_word_embeddings


def test_workers_and_resume_exclude_each_other(tasks, tokenizer):
    with pytest.raises(ValueError, match="cannot resume: set n_workers to 0"):
        train(tasks, tokenizer, n_steps=1, n_workers=1, resume=Resume("teacher", "test"))


def test_training_goes_on_from_the_weights_of_a_folder(run, tasks, tokenizer, tmp_path):
    run[0].save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    _, again = train(tasks, tokenizer, n_steps=20, start=tmp_path)
    assert again[0]["loss"] < run[1][0]["loss"] - 0.3  # the mean of the first 20 steps: it begins where the other ended


def test_tokens_that_a_folder_lacks_keep_their_own_embedding(tokenizer):
    model, known = surgery.load(ROOT / "assets/teacher/0")
    start = model.model.embed_tokens.weight.detach().clone()
    longer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))
    longer.add_tokens([" newcomer"])
    config = teacher_config(
        vocab_size=len(longer), d_model=64, n_layers=8, n_heads=4, n_kv_heads=2, head_dim=32, d_ff=192, pad_token_id=0
    )
    other = Qwen2ForCausalLM(config)
    own = other.model.embed_tokens.weight.detach().clone()
    take_over(other, longer, ROOT / "assets/teacher/0")
    after = other.model.embed_tokens.weight
    assert torch.equal(after[: len(known)], start) and torch.equal(after[-1], own[-1])
    assert torch.equal(other.model.layers[3].mlp.up_proj.weight, model.model.layers[3].mlp.up_proj.weight)


def test_a_folder_of_another_width_is_refused(tasks, tokenizer):
    with pytest.raises(ValueError, match=r"another width than teacher\.training\.d_model = 16"):
        train(tasks, tokenizer, n_steps=1, start=ROOT / "assets/teacher/0")
