"""A hybrid trained from random weights: what PostNAS saves, and the order that it should predict (Sec 2.1)."""

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from jetlab.config import ScratchTraining, Study
from jetlab.data.packing import Mixture
from jetlab.layers.dims import BlockDims
from jetlab.models import surgery
from jetlab.seeding import derive
from jetlab.tasks import build_tasks
from jetlab.train.captured import FixedShapes
from jetlab.train.hybrid import HybridRun, measured
from jetlab.train.loop import fit
from jetlab.train.losses import weighted_answer_loss
from jetlab.train.paths import difficulty, placement_kinds
from jetlab.train.teacher import initialise, muon_and_adamw


def train_from_scratch(
    study: Study,
    training: ScratchTraining,
    teacher: str,
    layers: tuple[int, ...],
    kind: str,
    dims: BlockDims,
    *,
    label: str,
    options: dict | None = None,
) -> HybridRun:
    """The hybrid that `train_hybrid` makes of `teacher`, with no weight of it: shape, tokeniser, tasks and exam are the same.

    Trained on the answers of all tasks with the teacher's own recipe. The seed is the study's.
    """
    seed, device = study.common.seed, study.common.device
    pretrained, tokenizer = surgery.load(teacher)
    config = pretrained.config
    torch.manual_seed(derive(seed, "scratch") % 2**32)
    model = AutoModelForCausalLM.from_config(config)
    initialise(model, seed)
    kinds = placement_kinds(config.num_hidden_layers, tuple(layers), kind)
    surgery.convert(model, kinds, dims, **(options or {}))
    model.to(device).train()
    mixture = Mixture(build_tasks(study.tasks.sizes), training.rows, tokenizer, study.tasks.seq_len, seed)

    def inputs_at(step: int) -> tuple[Tensor, Tensor]:
        batch = mixture.batch(step, difficulty(training.growth * training.n_steps, step))
        return batch.ids.to(device), batch.weights(training.weights).to(device)

    def loss_of(ids: Tensor, weight: Tensor) -> Tensor:
        hidden = model.model(input_ids=ids, use_cache=False)[0].flatten(0, 1)
        target = F.pad(ids[:, 1:], (0, 1)).flatten()  # behind the last token nothing is asked, its weight is 0
        return weighted_answer_loss(model.lm_head(hidden), target, weight)

    history = fit(
        model.named_parameters(),
        muon_and_adamw(model, training.muon_learning_rate, training.learning_rate),
        FixedShapes(inputs_at, loss_of),
        n_steps=training.n_steps,
        label=label,
        warmup=training.warmup,
        log_every=50,
    )
    model.eval()
    return measured(study, model, tokenizer, dims, history)
