"""The small NemotronH that the recipe of Nemotron Nano 2 is tried on, trained as the study's teachers are.

Its shape is the 12B's in miniature: the same kinds of layers in nearly the same shares, evenly spread attention without
positions, MLPs four times as wide as the model (arXiv:2508.14444, Sec 2.1).
"""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import NemotronHConfig, NemotronHForCausalLM

from jetlab.config import Nano2Study, NemotronPhase, NemotronTraining
from jetlab.data.packing import Mixture
from jetlab.data.tokenizer import build_tokenizer
from jetlab.models import nemotron
from jetlab.models.zoo import LinearDims, Shape, layer_kinds
from jetlab.paths import ROOT, require, resolve
from jetlab.seeding import generator
from jetlab.tasks import build_tasks
from jetlab.train.captured import FixedShapes
from jetlab.train.loop import fit, merge
from jetlab.train.losses import weighted_answer_loss
from jetlab.train.teacher import Steps, muon_and_adamw


def small_shape(training: NemotronTraining, vocab_size: int) -> Shape:
    """The shape that section `nano2.training` of params.yaml describes. Raises ValueError as `zoo.layer_kinds`."""
    kinds = layer_kinds(training.layers)
    return Shape(
        name="small NemotronH",
        family="nemotron_h",
        n_layers=len(kinds),
        vocab_size=vocab_size,
        tied=False,
        layer_kinds=kinds,
        linear=LinearDims(
            n_heads=training.mamba_heads,
            head_dim=training.state_size,
            head_dim_v=training.mamba_head_dim,
            n_groups=training.n_groups,
        ),
        gated_mlp=False,
        norms_per_layer=1,
        **training.model_dump(include={"d_model", "d_ff", "n_heads", "n_kv_heads", "head_dim"}),
    )


def small_config(training: NemotronTraining, tokenizer) -> NemotronHConfig:
    """The same as a configuration of Transformers, for the study's tokeniser."""
    return nemotron.config_of(
        small_shape(training, len(tokenizer)),
        chunk_size=training.chunk_size,
        max_position_embeddings=4096,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.pad_token_id + 1,
    )


def train(
    config: NemotronHConfig, training: NemotronTraining, tokenizer, seq_len: int, *, seed: int, device: str, label: str
) -> tuple[NemotronHForCausalLM, list[dict]]:
    """A NemotronH trained on the answers of all tasks, on the CPU, and its loss curve with the column `phase`.

    From Transformers' random weights, with embeddings of standard deviation 0.5; Muon on the matrices of the layers, AdamW on
    the rest, fp32 with TF32 products on a GPU, where a step is captured. Each phase has tasks and a decay of its own:
    tasks that need several look-ups come in once the first look-up is learned.
    """
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    model = NemotronHForCausalLM(config)
    with torch.no_grad():
        model.model.embeddings.weight.normal_(0.0, 0.5, generator=generator(seed, "embeddings"))
    model.to(device).train()
    histories = [
        (
            phase.name,
            _phase(model, phase, training, tokenizer, seq_len, seed=seed + 2 * i, label=f"{label}, {phase.name}"),
        )
        for i, phase in enumerate(training.phases)
    ]
    return model.cpu().eval(), merge(histories)


def _phase(
    model: NemotronHForCausalLM,
    phase: NemotronPhase,
    training: NemotronTraining,
    tokenizer,
    seq_len: int,
    *,
    seed: int,
    label: str,
) -> list[dict]:
    mixture = Mixture(build_tasks(training.sizes), phase.rows, tokenizer, seq_len, seed)
    steps = Steps(mixture, phase.n_steps, phase.growth)
    feed = iter(DataLoader(steps, batch_size=None, num_workers=training.n_workers)) if training.n_workers else None

    def inputs_at(step: int) -> Sequence[Tensor]:
        batch = steps[step] if feed is None else next(feed)
        return batch.ids, batch.ids.roll(-1, 1).flatten(), batch.weights(training.weights)

    def loss_of(ids: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        logits = model(input_ids=ids, use_cache=False).logits
        return weighted_answer_loss(logits.flatten(0, 1), target, weight)

    return fit(
        model.named_parameters(),
        muon_and_adamw(model, phase.muon_learning_rate, training.learning_rate),
        FixedShapes(inputs_at, loss_of),
        n_steps=phase.n_steps,
        label=label,
        warmup=training.warmup,
        log_every=20,
    )


def train_into(folder: str | Path, training: NemotronTraining, seq_len: int, *, seed: int, device: str) -> str:
    """Train one and write it to `folder`, an ordinary Hugging Face folder with loss.csv beside its weights; returns it."""
    tokenizer = build_tokenizer()
    config = small_config(training, tokenizer)
    model, history = train(config, training, tokenizer, seq_len, seed=seed, device=device, label=f"NemotronH {seed}")
    resolve(folder).mkdir(parents=True, exist_ok=True)
    model.save_pretrained(resolve(folder))
    tokenizer.save_pretrained(resolve(folder))
    pd.DataFrame(history).to_csv(resolve(folder) / "loss.csv", index=False, float_format="%.5g")
    return str(folder)


def provide(study: Nano2Study, out_dir: str | Path) -> list[str]:
    """The folders of the study's NemotronHs, by `nano2.source`: assets/nemotron/0 …, or trained into `out_dir`/nemotron/0 ….

    Raises MissingInput for a bundled one that is not there.
    """
    if study.source == "bundled":
        found = [require(f"assets/nemotron/{i}", "nano2") for i in range(study.n_models)]
        return [str(folder.relative_to(ROOT)) for folder in found]
    seq_len, seed, device = study.tasks.seq_len, study.common.seed, study.common.device
    return [
        train_into(Path(out_dir) / "nemotron" / str(i), study.training, seq_len, seed=seed + i, device=device)
        for i in range(study.n_models)
    ]
