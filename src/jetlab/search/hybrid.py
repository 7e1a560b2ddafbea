"""Jet-Nemotron's placement search on a model that is a hybrid already: which mixers of a Nemotron-H should attend?

Nemotron Nano 2 spreads its few attention layers by rule (arXiv:2508.14444, Sec 2.1); Jet-Nemotron searches for the places
where a model needs them (arXiv:2508.15884, Sec 2.2). Here each mixer layer of a pretrained Nemotron-H, Mamba2 or attention,
gets a new block of the other kind beside its own. All that came with the model is frozen, MLPs included; the new
blocks train over random placements; then every placement of as many attention layers as the model has is scored.
Layers are counted among the mixers alone, from 0: MLPs have no number.

The placements do not start as equals: the model's own is the pretrained model, and one that shares attention layers with
it has fewer new blocks. A gain over it is in spite of this, a loss may be due to it; the fair comparison is among
placements that keep as many of its attention layers.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations, count
from math import hypot

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn
from transformers import NemotronHForCausalLM
from transformers.masking_utils import create_causal_mask
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHBlock

from jetlab.config import Tasks, Training
from jetlab.data.packing import Mixture
from jetlab.evaluate.suite import Exam, exam, paired_difference, standard_error
from jetlab.search.placement import OBJECTIVES, Scored
from jetlab.search.selectors import Placement, ScoreTable, all_placements, random_mean, select, uniform
from jetlab.seeding import derive
from jetlab.tasks import SCORED, TASKS, build_tasks
from jetlab.train.distill import last_hidden
from jetlab.train.loop import Resume, adamw, fit, merge
from jetlab.train.losses import distillation_loss, feature_loss
from jetlab.train.paths import difficulty, path_law

LINEAR, FULL = "linear_attention", "full_attention"  # Transformers' names of the two kinds of mixer
SELECTORS = ("beam", "exhaustive", "uniform")


class HybridSupernet:
    """A Nemotron-H with two blocks for each mixer layer, its own and a new one of the other kind; one of them is in the model.

    `own` is the placement that the model came with, `blocks[i][kind]` the blocks of mixer i. The model is operated on in
    place; only the mixers of new blocks train, whose norms are copies of the own blocks'. Initial values are Transformers',
    by `seed`. At any placement `model.save_pretrained` writes an ordinary Nemotron-H.
    Raises ValueError for another model, and for one whose mixers are all of one kind.
    """

    def __init__(self, model: NemotronHForCausalLM, seed: int):
        if not isinstance(model, NemotronHForCausalLM):
            raise ValueError(
                f"the search needs a NemotronHForCausalLM, got {type(model).__name__}; use search.supernet"
            )
        kinds = model.config.layers_block_type
        self.model = model
        self._at = [index for index, kind in enumerate(kinds) if kind in (LINEAR, FULL)]
        self.own: Placement = tuple(i for i, index in enumerate(self._at) if kinds[index] == FULL)
        self.n_layers = len(self._at)
        if not 0 < len(self.own) < self.n_layers:
            raise ValueError(
                f"a placement needs mixers of both kinds, got {len(self.own)} attention layers among {self.n_layers} mixers; "
                "change the model's layer string"
            )
        model.requires_grad_(False)
        torch.manual_seed(derive(seed, "hybrid supernet") % 2**32)
        pairs = [(kinds[index], model.model.layers[index], _other(model, index)) for index in self._at]
        self.blocks = nn.ModuleList(
            nn.ModuleDict({kind: own, FULL if kind == LINEAR else LINEAR: new}) for kind, own, new in pairs
        )
        self.blocks.train(model.training)

    def activate(self, placement: Placement) -> None:
        """Put attention in the layers of `placement`, Mamba2 in all others. Raises ValueError for a layer that is not there."""
        if outside := [layer for layer in placement if not 0 <= layer < self.n_layers]:
            raise ValueError(f"mixer layers are 0 … {self.n_layers - 1}, got {', '.join(map(str, outside))}")
        kinds = list(self.model.config.layers_block_type)
        for layer, (index, blocks) in enumerate(zip(self._at, self.blocks, strict=True)):
            kinds[index] = FULL if layer in placement else LINEAR
            self.model.model.layers[index] = blocks[kinds[index]]
        self.model.config.layers_block_type = kinds  # caches and masks go by it

    def local_loss(self, tape: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """mean over mixers of ‖y' − y‖² / ‖y‖²: y the own mixer's output, y' the new one's on the same input.

        `tape` holds (input, output) of each of the model's layers at its own placement.
        """
        x = tape[0][0]
        masks = {FULL: create_causal_mask(self.model.config, x, None, None), LINEAR: None}
        losses = []
        for layer, (index, blocks) in enumerate(zip(self._at, self.blocks, strict=True)):
            kind, (x, y) = LINEAR if layer in self.own else FULL, tape[index]
            losses.append(feature_loss(blocks[kind](x, attention_mask=masks[kind]) - x, y - x))
        return torch.stack(losses).mean()


@torch.no_grad()
def _other(model: NemotronHForCausalLM, index: int) -> NemotronHBlock:
    """A new block of the other kind for layer `index`, which reads its input through a copy of the own block's norm."""
    config, own = model.config, model.model.layers[index]
    kinds = config.layers_block_type
    config.layers_block_type = [*kinds[:index], FULL if kinds[index] == LINEAR else LINEAR, *kinds[index + 1 :]]
    block = NemotronHBlock(config, index)  # of the kind that the config names
    config.layers_block_type = kinds
    block.apply(model._init_weights)
    block.norm.load_state_dict(own.norm.state_dict())
    block.norm.requires_grad_(False)
    return block.to(own.norm.weight)


@contextmanager
def _recorded(model: NemotronHForCausalLM) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Within it, `(input, output)` of every layer is recorded in order."""
    tape: list[tuple[Tensor, Tensor]] = []
    handles = [
        layer.register_forward_hook(lambda _layer, args, y: tape.append((args[0], y))) for layer in model.model.layers
    ]
    try:
        yield tape
    finally:
        for handle in handles:
            handle.remove()


def placement_law(name: str, supernet: HybridSupernet, seed: int) -> Callable[[int], Placement]:
    """From the number of a step to the placement it trains, by a law of `train.paths.path_law`; k is what the model has.

    `fixed_k` draws placements of the size that is searched, all equally likely. The model's own, in which nothing trains,
    is drawn again.
    """

    def law(step: int) -> Placement:
        paths = (path_law(name, supernet.n_layers, LINEAR, len(supernet.own), derive(seed, i))(step) for i in count())
        drawn = (tuple(layer for layer, kind in enumerate(kinds) if kind != LINEAR) for kinds in paths)
        return next(placement for placement in drawn if placement != supernet.own)

    return law


def train(
    supernet: HybridSupernet,
    mixture: Mixture,
    training: Training,
    law: Callable[[int], Placement],
    *,
    label: str = "hybrid supernet",
    resume_key: object | None = None,
) -> list[dict]:
    """Train the new mixers; everything else stays as it is, to the bit. Returns the loss curve.

    First `n_local` steps of `HybridSupernet.local_loss`, then `n_steps` of the placement that `law` gives:
    `feature_weight` · mean over layers of ‖h − h^T‖² / ‖h^T‖², h the hidden states after a layer, + `logit_weight` ·
    Σ_tasks weight · KL(model ‖ placement) at the answers. Afterwards the model is at its own placement.
    With a `resume_key` a run that was killed goes on where it was.
    """
    model = supernet.model
    device = next(model.parameters()).device

    def read(placement: Placement, ids: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        supernet.activate(placement)
        with _recorded(model) as tape:
            return last_hidden(model, ids), tape

    def local(step: int):
        with torch.no_grad():
            _, tape = read(supernet.own, mixture.batch(step).ids.to(device))
        return supernet.local_loss(tape), {}

    def end_to_end(step: int):
        number = training.n_local + step
        batch = mixture.batch(number, difficulty(training.growth * training.n_steps, step)).to(device)
        position, _, which = batch.targets()
        with torch.no_grad():
            hidden, tape_t = read(supernet.own, batch.ids)
            expected = model.lm_head(hidden[position])
        hidden, tape = read(law(step), batch.ids)
        answers = distillation_loss(model.lm_head(hidden[position]), expected, which, training.weights)
        features = torch.stack([feature_loss(h, h_t) for (_, h), (_, h_t) in zip(tape, tape_t, strict=True)]).mean()
        loss = training.feature_weight * features + training.logit_weight * answers
        return loss, {"tokens": (number + 1) * mixture.tokens_per_step}

    history, checkpoints = [], []
    trained = {name: p for name, p in supernet.blocks.named_parameters() if p.requires_grad}
    for phase, loss_at, steps in (("local", local, training.n_local), ("end to end", end_to_end, training.n_steps)):
        resume = None if resume_key is None else Resume(f"{label}-{phase}".replace(" ", "-"), [resume_key, phase])
        optimiser = adamw(trained.values(), training.learning_rate)
        named = f"{label}, {phase}"
        part = fit(
            trained.items(), [optimiser], loss_at, n_steps=steps, label=named, warmup=training.warmup, resume=resume
        )
        history.append((phase, part))
        if resume is not None:
            resume.save(steps, {f"value.{name}": p for name, p in trained.items()}, part)
            checkpoints.append(resume)
    for resume in checkpoints:
        resume.clear()
    supernet.activate(supernet.own)
    return merge(history)


def evaluate(
    supernet: HybridSupernet, paper: Exam, placements: Iterable[Placement], label: str = "placements"
) -> ScoreTable:
    """The scores under each placement -> {placement: {task: Score}}. Afterwards the model is at its own placement."""
    table, wanted = {}, list(placements)
    for number, placement in enumerate(wanted, start=1):
        supernet.activate(placement)
        table[placement] = paper.score(supernet.model, label=f"{label} {number}/{len(wanted)}")
    supernet.activate(supernet.own)
    return table


@dataclass(frozen=True)
class HybridPlacementRun:
    """All that the search says. `tables` maps split to {placement: {task: Score}}: every placement of `budget` layers and none.

    On split `search`, where selectors look, there are smaller placements too. `tokens` are those of one score by task.
    """

    supernet: HybridSupernet
    beam_width: int
    tables: dict[str, ScoreTable]
    tokens: dict[str, int]
    history: list[dict]

    @property
    def budget(self) -> int:
        """Attention layers of the model, and of every placement that is compared with it."""
        return len(self.supernet.own)

    @property
    def pool(self) -> list[Placement]:
        """Every placement of the budget."""
        return list(combinations(range(self.supernet.n_layers), self.budget))

    def on(self, split: str) -> Scored:
        """The supernet on a split, as selectors see it; the model itself is the ceiling."""
        table = self.tables[split]
        ceilings = {name: score.value for name, score in table[self.supernet.own].items()}
        return Scored(
            n_layers=self.supernet.n_layers,
            table=table,
            ceilings=ceilings,
            divergence={},
            logit_errors={},
            tokens=self.tokens,
        )

    def found(self, task: str) -> Placement:
        """What beam search from no attention chooses for a task, or for "all", on split `search`."""
        return select(self.on("search"), self.budget, task, width=self.beam_width).placement

    def placements(self) -> list[dict]:
        """Score and standard error of every placement of the budget, and of none, by task on each split.

        `kept` counts attention layers that are the model's own: compare placements that keep as many.
        """
        return [
            {
                "split": split,
                "task": task,
                "layers": _text(full),
                "kept": len({*full} & {*self.supernet.own}),
                "score": score.value,
                "se": score.se,
                "loss": -score.neg_loss,
            }
            for split, table in self.tables.items()
            for full in ((), *self.pool)
            for task, score in table[full].items()
        ]

    def choices(self) -> list[dict]:
        """What each selector chose on split `search`, beside the model's own placement (`pretrained`) and a random one.

        `value` is what the search maximises, on split `test`; `regret` that of the placement that an exhaustive search on
        the same split `search` would choose less this one, below zero where `test` disagrees. Standard errors are paired
        over contexts; those of "all" are over the tasks'. `random` is the mean of every placement.
        """
        rows, own = [], self.supernet.own
        for task in OBJECTIVES:
            values = {full: self._values(full, task) for full in self.pool}
            mean = [np.mean(of_task, axis=0) for of_task in zip(*values.values(), strict=True)]
            found = [("pretrained", _text(own), values[own], 0, 0), ("random", "", mean, 0, 0)]
            for name in SELECTORS:
                choice = select(self.on("search"), self.budget, task, selector=name, width=self.beam_width)
                full = choice.placement
                found.append((name, _text(full), values[full], choice.n_evaluated, choice.n_tokens))
                if name == "exhaustive":
                    best = values[full]
            for selector, layers, mine, n_placements, n_tokens in found:
                value, se = _mean(mine)
                regret, regret_se = _mean([b - m for b, m in zip(best, mine, strict=True)])
                row = {"task": task, "selector": selector, "layers": layers, "value": value, "se": se, "regret": regret}
                rows.append(row | {"regret_se": regret_se, "placements": n_placements, "tokens": n_tokens})
        return rows

    def estimates(self) -> list[tuple[str, float, float, int]]:
        """(key, value, standard error, contexts) on split `test`, keys `{task}_{what}`; accuracies.

        `found` and `exhaustive` are chosen for the task, `common` by beam search for all tasks at once, all on split `search`;
        `uniform` is the rule of `selectors.uniform`, `pretrained` the model, `random` the mean of every placement.
        Differences are paired over contexts.
        """
        table, rows, own = self.tables["test"], [], self.supernet.own
        for task in SCORED:
            exhaustive = select(self.on("search"), self.budget, task, selector="exhaustive").placement
            chosen = {"found": self.found(task), "common": self.found("all"), "exhaustive": exhaustive}
            chosen |= {"uniform": uniform(self.supernet.n_layers, self.budget), "pretrained": own, "all_linear": ()}
            scores = {what: table[full][task] for what, full in chosen.items()}
            rows += [(f"{task}_{what}", s.value, s.se, len(s.correct)) for what, s in scores.items()]
            every = [table[full][task] for full in self.pool]
            rows.append((f"{task}_random", *random_mean(every)))
            for what in ("found", "common"):
                for other in ("pretrained", "uniform"):
                    rows.append((f"{task}_{what}_minus_{other}", *paired_difference(scores[what], scores[other])))
                gain = scores[what].correct - np.mean([s.correct for s in every], axis=0)
                rows.append((f"{task}_{what}_minus_random", float(gain.mean()), standard_error(gain), len(gain)))
        return rows

    def _values(self, full: Placement, task: str) -> list[np.ndarray]:
        """What a search maximises, by context on split `test`; of "all" an array for each task, whose means add up to it."""
        scores = self.tables["test"][full]
        if task != "all":
            return [-scores[task].loss if TASKS[task].objective == "neg_loss" else scores[task].correct]
        own = self.tables["test"][self.supernet.own]
        ranges = {name: max(own[name].value - own[name].chance, 1e-9) for name in SCORED}
        return [(scores[name].correct - own[name].chance) / ranges[name] / len(SCORED) for name in SCORED]


def _mean(values: Sequence[np.ndarray]) -> tuple[float, float]:
    """Sum of the means of independent samples, and its standard error."""
    return sum(float(x.mean()) for x in values), hypot(*(standard_error(x) for x in values))


def _text(placement: Placement) -> str:
    return " ".join(map(str, placement))


def search_attention(
    model: NemotronHForCausalLM,
    tokenizer,
    tasks: Tasks,
    training: Training,
    *,
    law: str = "fixed_k",
    beam_width: int = 3,
    seed: int,
    device: str = "cpu",
) -> HybridPlacementRun:
    """Build and train the supernet of a pretrained Nemotron-H, and score every placement of its number of attention layers.

    The model is moved to `device` and operated on in place; it ends frozen, at its own placement. `law` as in `path_law`.
    """
    model.to(device).eval()
    pretrained = hashlib.sha256(save({name: x.contiguous() for name, x in model.state_dict().items()})).hexdigest()
    supernet = HybridSupernet(model, seed)
    mixture = Mixture(build_tasks(tasks.sizes), training.rows, tokenizer, tasks.seq_len, seed)
    key = [pretrained, model.config.to_dict(), tasks.model_dump(), training.model_dump(), law, seed]
    history = train(supernet, mixture, training, placement_law(law, supernet, seed), resume_key=key)
    budget = len(supernet.own)
    every = all_placements(supernet.n_layers, budget)
    wanted = {"search": every, "test": [full for full in every if len(full) in (0, budget)]}
    papers = {split: exam(tasks, tokenizer, split, seed, SCORED) for split in wanted}
    tables = {split: evaluate(supernet, papers[split], wanted[split], f"placements, {split}") for split in wanted}
    return HybridPlacementRun(supernet, beam_width, tables, papers["search"].n_tokens(), history)
