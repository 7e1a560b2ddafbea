"""Specification of training: gradients with and without recomputation, and the Trainer of Transformers."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

# The switch has another name in newer versions of Transformers; this one is known to all of them.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
HYBRID = ["jetblock", "attention", "sliding_attention", "rwkv7", "rwkv7"]


def loss_and_gradients(model, ids, mask):
    model.zero_grad()
    labels = ids.masked_fill(mask == 0, -100)
    loss = model(ids, attention_mask=mask, labels=labels, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def test_recomputed_layers_give_the_same_loss_and_gradients(mixture, build_model, padded):
    model, (ids, mask, _) = build_model(mixture).train(), padded
    loss, gradients = loss_and_gradients(model, ids, mask)
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    again, recomputed = loss_and_gradients(model, ids, mask)
    torch.testing.assert_close(again, loss, rtol=0, atol=0)
    torch.testing.assert_close(recomputed, gradients)
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())


def test_gradients_pass_between_calls_through_the_cache(build_model, tokens):
    model, ids = build_model(HYBRID), tokens(1, 8)
    weight = model.model.layers[0].self_attn.v_proj.weight
    (whole,) = torch.autograd.grad(model(ids).logits[:, -1].sum(), weight)
    cache = model(ids[:, :5]).past_key_values
    (parts,) = torch.autograd.grad(model(ids[:, 5:], past_key_values=cache).logits[:, -1].sum(), weight)
    torch.testing.assert_close(parts, whole)


def test_reentrant_recomputation_is_refused(build_model):
    with pytest.raises(ValueError, match=r"use_reentrant must be False, got True: values that layers share"):
        build_model(HYBRID).gradient_checkpointing_enable({"use_reentrant": True})


def test_the_trainer_takes_three_steps(build_model, tokens, tmp_path):
    model = build_model(HYBRID).float()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    options = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        gradient_checkpointing=True,
        logging_steps=1,
        save_steps=3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    data = [{"input_ids": row, "labels": row} for row in tokens(6, 10)]
    trainer = Trainer(model=model, args=options, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3
    assert all(torch.tensor(losses).isfinite())
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert (tmp_path / "checkpoint-3" / "model.safetensors").is_file()
