"""The final model in the paper's two stages (Sec 3.1): first the linear layers alone, then all weights."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from jetlab.config import DistillStudy
from jetlab.data.packing import Mixture
from jetlab.evaluate.suite import Score, exam
from jetlab.layers.dims import BlockDims
from jetlab.models import export, surgery
from jetlab.paths import resolve
from jetlab.tasks import build_tasks
from jetlab.train import launch
from jetlab.train.captured import FixedShapes
from jetlab.train.hybrid import HybridRun, train_hybrid
from jetlab.train.loop import Resume, adamw, fit
from jetlab.train.losses import distillation_loss, weighted_distillation_loss
from jetlab.train.main import WeightsJob


@dataclass(frozen=True)
class DistillRun:
    """The hybrid after both stages, the scores after each on split `test`, and the loss curve over both."""

    hybrid: HybridRun
    stage1: dict[str, Score]
    stage2: dict[str, Score]
    history: list[dict]

    def save(self, folder: str | Path, **options) -> None:
        """Write the model as a Jet-Nemotron folder; `options` are those of its linear kind."""
        export.save(self.hybrid.model, folder, self.hybrid.tokenizer, dims=self.hybrid.dims, **options)


def last_hidden(model, ids: Tensor) -> Tensor:
    """Hidden states after the final norm, [B · T, D]."""
    return model.model(input_ids=ids, use_cache=False)[0].flatten(0, 1)


def distill(
    study: DistillStudy,
    teacher: str,
    layers: tuple[int, ...],
    kind: str,
    dims: BlockDims,
    *,
    options: dict | None = None,
) -> DistillRun:
    """Stage 1 trains the linear layers of the hybrid, stage 2 all its weights on Σ_tasks weight · KL(teacher ‖ student).

    On text stage 2 has the loss of `text.WeightsStep`. `options` are passed to the block.
    """
    label = "distill, stage 1"
    run = train_hybrid(study, study.stage1, teacher, layers, kind, dims, label=label, options=options)
    stage1 = run.scores
    key = [study.model_dump(), layers, kind, str(dims), options, launch.model_digest(teacher)]
    stage2_on = _stage2_on_tasks if study.text is None else _stage2_on_text
    history = stage2_on(study, teacher, run, key, options or {})
    stage2 = exam(study.tasks, run.tokenizer, "test", study.common.seed).score(run.model)
    return DistillRun(
        run,
        stage1,
        stage2,
        [
            *run.history,
            *({**row, "step": row["step"] + run.history[-1]["step"], "phase": "all weights"} for row in history),
        ],
    )


def _stage2_on_text(study: DistillStudy, teacher: str, run: HybridRun, key: list, options: dict) -> list[dict]:
    read = [launch.what_is_read(study.text, stage) for stage in (1, 2)]
    folder = launch.job_folder("distill, stage 2", [*read, study.model_dump(exclude={"text"}), *key[1:]])
    surgery.save(run.model, resolve(folder) / "model", run.tokenizer, dims=run.dims, **options)
    run.model.cpu()  # the GPUs belong to the processes that train
    job = WeightsJob(
        folder=folder,
        label="distill, stage 2",
        teacher=str(teacher),
        text=study.text,
        seed=study.common.seed,
        device=study.common.device,
        model=f"{folder}/model",
        n_steps=study.stage2_steps,
        learning_rate=study.stage2_learning_rate,
        warmup=study.stage1.warmup,
    )
    trained, history = launch.train(job)
    launch.put(run.model, trained)
    run.model.to(study.common.device).eval()
    return history


def _stage2_on_tasks(study: DistillStudy, teacher: str, run: HybridRun, key: list, options: dict) -> list[dict]:
    model, training, seed = run.model, study.stage1, study.common.seed
    reference, _ = surgery.load(teacher, device=study.common.device)
    mixture = Mixture(build_tasks(study.tasks.sizes), training.rows, run.tokenizer, study.tasks.seq_len, seed + 1)
    model.requires_grad_(True).train()

    def tokens(step: int) -> dict[str, float]:
        return {"tokens": (step + 1) * mixture.tokens_per_step}

    def loss_at(step: int):
        batch = mixture.batch(step).to(study.common.device)
        position, _, which = batch.targets()
        with torch.no_grad():
            expected = reference.lm_head(last_hidden(reference, batch.ids)[position])
        student = model.lm_head(last_hidden(model, batch.ids)[position])
        return distillation_loss(student, expected, which, training.weights), tokens(step)

    def inputs_at(step: int) -> tuple[Tensor, Tensor]:
        batch = mixture.batch(step)
        return batch.ids, batch.weights(training.weights)

    def loss_of(ids: Tensor, weight: Tensor) -> Tensor:
        with torch.no_grad():
            expected = reference.lm_head(last_hidden(reference, ids))
        return weighted_distillation_loss(model.lm_head(last_hidden(model, ids)), expected, weight)

    if study.common.device == "cuda":
        loss_at = FixedShapes(inputs_at, loss_of, tokens)

    resume = Resume("distill-stage-2", key)
    history = fit(
        model.named_parameters(),
        [adamw(model.parameters(), study.stage2_learning_rate)],
        loss_at,
        n_steps=study.stage2_steps,
        label="distill, stage 2",
        warmup=training.warmup,
        resume=resume,
    )
    resume.clear()
    model.eval()
    return history
