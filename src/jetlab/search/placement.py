"""The placement study on one supernet: placements of a few layers scored on three splits, and read by every selector.

Split `search` is what selectors see, `select` decides the placement that later stages keep, `test` is what is reported.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations, permutations, product
from math import ceil, comb, hypot
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel

from jetlab.config import PlacementStudy
from jetlab.data.packing import Mixture
from jetlab.evaluate.divergence import logit_error, text_divergence, token_rows
from jetlab.evaluate.suite import Exam, Score, exam, paired_difference, standard_error
from jetlab.parallel import dealt, devices, parallel_map
from jetlab.search.gates import train_gates
from jetlab.search.selectors import (
    Placement,
    ScoreTable,
    all_placements,
    evaluate,
    objective,
    random_mean,
    random_placements,
    rank_correlation,
    sampling_error,
    select,
    uniform,
)
from jetlab.search.supernet import load, members
from jetlab.tasks import SCORED, SPLITS, SUB_AXES, TASKS, build_tasks
from jetlab.train.paths import placement_kinds

OBJECTIVES = (*SCORED, "all")
TRANSFER = tuple("task budget found_on tested_on same_teacher accuracy own difference se n".split())  # of `transfer`
AGREEMENT = ("task", "a", "b", "same_teacher", "spearman", "n_layers")  # of `agreement`
N_DRAWS = 16  # random placements that stand for all where not all are evaluated


@dataclass
class Scored:
    """A supernet on one split, as selectors see it: every score is looked up.

    `table` maps placement to {task: Score}, `divergence` placement to KL on text in nats a token, `logit_errors` to the
    mean squared error of the logits on training rows, `tokens` objective to the tokens of one score. Raises ValueError
    for a placement that is not in the table asked, and for gates.
    """

    n_layers: int
    table: ScoreTable
    ceilings: dict[str, float]
    divergence: dict[Placement, float]
    logit_errors: dict[Placement, float]
    tokens: dict[str, int]

    def scores(self, placements: Iterable[Placement], task: str) -> dict[Placement, float]:
        placements, distances = list(placements), {"kl": self.divergence, "logit_error": self.logit_errors}
        known = distances.get(task, self.table)
        if missing := [full for full in placements if full not in known]:
            ways_out = {"kl": "divergence is of single layers", "logit_error": "selector logit_error evaluates its own"}
            way_out = ways_out.get(task, "raise placement.max_budget")
            raise ValueError(f"placement {missing[0]} is not among those evaluated; {way_out}")
        if task in distances:
            return {full: -known[full] for full in placements}
        return {full: objective(self.table[full], task, self.ceilings) for full in placements}

    def n_tokens(self, task: str) -> int:
        return sum(self.tokens[name] for name in SCORED) if task == "all" else self.tokens[task]

    def gates(self, budget: int, task: str) -> tuple[Sequence[float], int]:
        raise ValueError("gates train on the supernet itself, of which only scores are here; leave out selector gates")


@dataclass
class Live(Scored):
    """The same with the supernet at hand: what is missing but for the divergence is evaluated, and gates can be trained.

    Logit errors are those on `calibration`, rows of tokens.
    """

    model: PreTrainedModel
    tokenizer: object
    study: PlacementStudy
    paper: object
    seed: int
    calibration: list[list[int]]

    def scores(self, placements: Iterable[Placement], task: str) -> dict[Placement, float]:
        placements, known = list(placements), self.logit_errors if task == "logit_error" else self.table
        missing, block = [full for full in placements if full not in known], self.study.supernet.block
        if missing and task == "logit_error":
            kinds = {full: placement_kinds(self.n_layers, full, block) for full in missing}
            teacher = placement_kinds(self.n_layers, tuple(range(self.n_layers)), block)
            errors = logit_error(self.model, self.calibration, kinds.values(), teacher)
            known |= {full: float(errors[architecture].mean()) for full, architecture in kinds.items()}
        elif missing and task != "kl":
            known |= evaluate(self.model, block, self.paper, missing, "placements, on the way")
        return super().scores(placements, task)

    def gates(self, budget: int, task: str) -> tuple[Sequence[float], int]:
        study, training = self.study, self.study.supernet.training
        scored = {name: n for name, n in training.rows.items() if name in SCORED}
        rows = scored if task == "all" else {task: sum(scored.values())}  # as many for every objective
        tasks, seq_len = build_tasks(study.tasks.sizes), study.tasks.seq_len
        mixture = Mixture(tasks, rows, self.tokenizer, seq_len, self.seed + 1)  # rows that the supernet has not seen
        run = train_gates(
            self.model,
            mixture,
            budget=budget,
            linear=study.supernet.block,
            n_steps=study.gate_steps,
            learning_rate=study.gate_learning_rate,
            label=f"gates, {task}, {budget}",
        )
        return run.gates, run.n_tokens


@dataclass(frozen=True)
class PlacementRun:
    """All that one supernet says: `name` and seed as in `supernet.members`.

    `tables` maps split to {placement: {task: Score}}, `full` to the teacher's own; `max_budget` is the largest budget of
    which every placement is in the tables. `logit_errors` holds what selector logit_error looked at. `choices` has a row
    for each objective, budget and selector; where budgets are larger, what was chosen and `N_DRAWS` random placements
    are in the table of split `test`.
    """

    name: str
    teacher: str
    n_layers: int
    max_budget: int
    beam_width: int
    tables: dict[str, ScoreTable]
    full: dict[str, dict[str, Score]]
    divergence: dict[Placement, float]
    logit_errors: dict[Placement, float]
    tokens: dict[str, int]
    choices: list[dict]

    def on(self, split: str) -> Scored:
        """The supernet on a split, as selectors see it."""
        ceilings = {name: score.value for name, score in self.full[split].items()}
        return Scored(self.n_layers, self.tables[split], ceilings, self.divergence, self.logit_errors, self.tokens)

    def found(self, task: str, budget: int) -> Placement:
        """What beam search chooses for one task, on split `search`."""
        for row in self.choices:
            if (row["task"], row["budget"], row["selector"]) == (task, budget, "beam"):
                return row["layers"]
        return select(self.on("search"), budget, task, width=self.beam_width).placement

    def pool(self, budget: int) -> list[Placement]:
        """The placements that stand for a random one: all of the budget, or `N_DRAWS` of them where not all are evaluated."""
        n = comb(self.n_layers, budget)
        return random_placements(self.n_layers, budget, n if budget <= self.max_budget else N_DRAWS)

    def common(self, budget: int) -> Placement:
        """One placement for all: beam search on the mean of the normalised scores, on split `select`."""
        return select(self.on("select"), budget, "all", width=self.beam_width).placement

    def layer_map(self, task: str) -> list[float]:
        """The objective with one layer full, on split `search`, layer by layer (Fig 5a); "kl": minus the divergence."""
        singles = [(layer,) for layer in range(self.n_layers)]
        return list(self.on("search").scores(singles, task).values())

    def importance(self) -> list[dict]:
        """`layer_map` of every scored task and of the divergence, beside the score of no full layer."""
        return [
            {"task": task, "layer": layer, "score": score, "all_linear": self.on("search").scores([()], task)[()]}
            for task in (*SCORED, "kl")
            for layer, score in enumerate(self.layer_map(task))
        ]

    def selectors(self) -> list[dict]:
        """Each selector's choice on split `search`, what it cost in `placements` looked at and `tokens`, and its regret.

        Regret is the test score of the placement that an exhaustive search on the same split `search` would choose, less
        that of the one chosen: 0 where both choose alike. It can fall below zero, since `test` has other examples, and is
        None where not every placement of the budget is evaluated. `all` is the mean of the normalised scores. The row of
        `random` is the mean over `pool`, with the standard deviation as `spread`. Gates look at no placement: they
        train, and their cost is in `tokens` alone.
        """
        rows = []
        kept = self.on("test")
        for row in self.choices:
            task, budget = row["task"], row["budget"]
            if row["selector"] == "random":
                pool = list(kept.scores(self.pool(budget), task).values())
                value, spread, layers = float(np.mean(pool)), float(np.std(pool)), ""
            else:
                value, spread, layers = kept.scores([row["layers"]], task)[row["layers"]], None, row["layers"]
            regret = None
            if budget <= self.max_budget:
                best = select(self.on("search"), budget, task, selector="exhaustive").placement
                regret = kept.scores([best], task)[best] - value
            rows.append(
                {
                    "task": task,
                    "budget": budget,
                    "selector": row["selector"],
                    "layers": " ".join(map(str, layers)),
                    "value": value,
                    "spread": spread,
                    "regret": regret,
                    "placements": row["placements"],
                    "tokens": row["tokens"],
                }
            )
        return rows

    def pairs(self) -> list[dict]:
        """`interactions` on split `test`."""
        return interactions(self.tables["test"], self.n_layers)

    def estimates(self) -> list[tuple[str, float, float, int]]:
        """(key, value, standard error, contexts) on split `test`, keys `{task}_k{budget}_{what}`; accuracies.

        `found` is chosen for the task by beam search, `exhaustive` by looking at every placement, both on split
        `search`; `common` for all tasks at once on split `select`. `random` is the mean over `pool`; where that is a
        sample, its standard error holds that of drawing it. Differences are paired over contexts. Nothing is searched
        for a sub-axis, so it has no `found` and no `exhaustive`; budgets above `max_budget`, for which a beam was run,
        have no `exhaustive` and no `common`.
        """
        test, rows = self.tables["test"], []
        searched = {row["budget"] for row in self.choices if row["selector"] == "beam"}
        for task, budget in product((*SCORED, *SUB_AXES), sorted({*range(1, self.max_budget + 1), *searched})):
            every = budget <= self.max_budget
            if task in SUB_AXES and not every:
                continue
            key = f"{task}_k{budget}"
            chosen = {"uniform": uniform(self.n_layers, budget), "all_linear": ()}
            if every:
                chosen["common"] = self.common(budget)
            if task in SCORED:
                chosen["found"] = self.found(task, budget)
            if task in SCORED and every:
                chosen["exhaustive"] = select(self.on("search"), budget, task, selector="exhaustive").placement
            scores = {what: test[full][task] for what, full in chosen.items()} | {"teacher": self.full["test"][task]}
            rows += [(f"{key}_{what}", s.value, s.se, len(s.correct)) for what, s in scores.items()]
            pool = [test[full][task] for full in self.pool(budget)]
            drawing = sampling_error([score.value for score in pool], comb(self.n_layers, budget))
            value, se, n = random_mean(pool)
            rows.append((f"{key}_random", value, hypot(se, drawing), n))
            if task in SCORED:
                found, others = scores["found"], np.mean([score.correct for score in pool], axis=0)
                rows.append((f"{key}_found_minus_uniform", *paired_difference(found, scores["uniform"])))
                gain = found.correct - others
                se = hypot(standard_error(gain), drawing)
                rows.append((f"{key}_found_minus_random", float(gain.mean()), se, len(gain)))
        return rows


def interactions(table: ScoreTable, n_layers: int) -> list[dict]:
    """Every pair of full layers in `table`, by task: its objective, and its interaction with standard error.

    The interaction s(a, b) − s(a) − s(b) + s(∅) is 0 where a pair is worth the sum of its parts; over contexts, of
    accuracies, for knowledge of minus the loss. Pairs that were not evaluated have no row.
    """
    rows = []
    for task in SCORED:
        by_context = {full: _per_context(scores[task]) for full, scores in table.items() if len(full) <= 2}
        for a, b in combinations(range(n_layers), 2):
            if (a, b) not in by_context:
                continue
            parts = by_context[a, b] - by_context[a,] - by_context[b,] + by_context[()]
            rows.append(
                {
                    "task": task,
                    "first": a,
                    "second": b,
                    "score": float(by_context[a, b].mean()),
                    "interaction": float(parts.mean()),
                    "interaction_se": standard_error(parts),
                }
            )
    return rows


def transfer(runs: Sequence[PlacementRun], budget: int) -> list[dict]:
    """What a placement found on supernet `a`, split `search`, is worth on supernet `b`, split `test`: accuracies.

    Beside it what `b` found for itself, and their difference paired over contexts with its standard error: of another
    seed of the same teacher it says how much of a choice was luck, of another teacher how much was that teacher.
    """
    rows = []
    for a, b in permutations(runs, 2):
        for task in SCORED:
            theirs, own = (b.tables["test"][run.found(task, budget)][task] for run in (a, b))
            difference, se, n = paired_difference(theirs, own)
            rows.append(
                {
                    "task": task,
                    "budget": budget,
                    "found_on": a.name,
                    "tested_on": b.name,
                    "same_teacher": int(a.teacher == b.teacher),
                    "accuracy": theirs.value,
                    "own": own.value,
                    "difference": difference,
                    "se": se,
                    "n": n,
                }
            )
    return rows


def agreement(runs: Sequence[PlacementRun]) -> list[dict]:
    """Spearman's ρ of the one-layer maps of every two supernets, by task: of other teachers or of other seeds."""
    return [
        {
            "task": task,
            "a": a.name,
            "b": b.name,
            "same_teacher": int(a.teacher == b.teacher),
            "spearman": rank_correlation(a.layer_map(task), b.layer_map(task)),
            "n_layers": a.n_layers,
        }
        for a, b in combinations(runs, 2)
        for task in (*SCORED, "kl")
    ]


def _per_context(score: Score) -> np.ndarray:
    return -score.loss if TASKS[score.task].objective == "neg_loss" else score.correct


def _n_tokens(study: PlacementStudy, tokenizer, split: str) -> dict[str, int]:
    """Tokens that one placement's score reads, by task: each context once, each question with its answers."""
    tasks, found = build_tasks(study.tasks.sizes), {}
    for name in SCORED:
        examples = tasks[name].examples(split, study.tasks.n_contexts[split], study.common.seed)
        texts = [e.context for e in examples]
        texts += [q.prompt + q.answer for e in examples for q in e.questions[: study.tasks.n_questions]]
        found[name] = sum(map(len, tokenizer(texts, add_special_tokens=False).input_ids))
    return found


def calibration_rows(study: PlacementStudy, tokenizer, seed: int) -> list[list[int]]:
    """Rows of tokens of the mixture that the supernet of `seed` trains on, without padding, and none that it has seen.

    Whole steps, so that tasks keep their shares, until there are as many rows as a task has contexts on split `search`:
    about what `kl` reads. Raises ValueError where the supernet does not train on tasks.
    """
    training = study.supernet.training
    mixture = Mixture(build_tasks(study.tasks.sizes), training.rows, tokenizer, study.tasks.seq_len, seed + 1)
    n_steps = ceil(study.tasks.n_contexts["search"] / sum(training.rows.values()))
    rows = [row for step in range(n_steps) for row in mixture.batch(step).ids]
    return [row[: int((row != tokenizer.pad_token_id).nonzero()[-1]) + 1].tolist() for row in rows]


def _paper(study: PlacementStudy, tokenizer, split: str) -> Exam:
    names = (*SCORED, *SUB_AXES) if split == "test" else SCORED  # the others are no objective
    return exam(study.tasks, tokenizer, split, study.common.seed, names)


def _tables(
    member: tuple[str, str, str, int],
    study: PlacementStudy,
    model: PreTrainedModel,
    papers: dict[str, Exam],
    placements: Sequence[Placement],
    on: Sequence[str],
) -> dict[str, ScoreTable]:
    """The scores of placements on every split; with several devices `on` which to work, a share on each."""
    if len(on) == 1:
        return {
            split: evaluate(model, study.supernet.block, paper, placements, f"placements, {split}")
            for split, paper in papers.items()
        }
    shares = list(zip(on, dealt(placements, len(on)), strict=False))
    parts = parallel_map(partial(_share, member, study), shares, n_workers=len(on), n_threads=study.common.n_threads)
    return {split: {full: s for part in parts for full, s in part[split].items()} for split in papers}


def _share(
    member: tuple[str, str, str, int], study: PlacementStudy, share: tuple[str, Sequence[Placement]]
) -> dict[str, ScoreTable]:
    """What one process scores: some of the placements, on the device that is its own."""
    device, placements = share
    model, tokenizer = load(study.supernet, member[1], member[2], device=device)
    papers = {split: _paper(study, tokenizer, split) for split in SPLITS[1:]}
    return _tables(member, study, model, papers, placements, [device])


def _search(member: tuple[str, str, str, int], study: PlacementStudy, on: Sequence[str]) -> PlacementRun:
    name, teacher, weights, seed = member
    model, tokenizer = load(study.supernet, teacher, weights, device=on[0] if len(on) == 1 else "cpu")
    n_layers, block = model.config.num_hidden_layers, study.supernet.block
    if study.select_budget >= n_layers:
        raise ValueError(
            f"select_budget must leave a layer linear, below {n_layers} here, got {study.select_budget}; lower it"
        )
    placements, everything = all_placements(n_layers, study.max_budget), tuple(range(n_layers))
    papers = {split: _paper(study, tokenizer, split) for split in SPLITS[1:]}
    tables = _tables(member, study, model, papers, [*placements, everything], on)
    full = {split: table.pop(everything) for split, table in tables.items()}
    model.to(on[0])  # which the processes that scored have left
    texts = token_rows(
        build_tasks(study.tasks.sizes)["text"], tokenizer, "search", study.tasks.n_contexts["search"], study.common.seed
    )
    kinds = {p: placement_kinds(n_layers, p, block) for p in all_placements(n_layers, 1)}
    divergence = text_divergence(model, texts, kinds.values(), placement_kinds(n_layers, everything, block))
    by_placement = {p: float(divergence[architecture].mean()) for p, architecture in kinds.items()}
    calibration = calibration_rows(study, tokenizer, seed) if "logit_error" in study.selectors else []
    read = {"kl": sum(map(len, texts)), "logit_error": sum(map(len, calibration))}
    tokens = _n_tokens(study, tokenizer, "search") | read
    ceilings = {task: score.value for task, score in full["search"].items()}
    live = Live(
        n_layers,
        dict(tables["search"]),
        ceilings,
        by_placement,
        {},
        tokens,
        model,
        tokenizer,
        study,
        papers["search"],
        seed,
        calibration,
    )
    choices = []
    for task, budget, selector in product(OBJECTIVES, range(1, study.select_budget + 1), study.selectors):
        if selector == "exhaustive" and budget > study.max_budget:
            continue  # 2380 more placements at 16 layers and budgets of 3 and 4
        choice = select(live, budget, task, selector=selector, width=study.beam_width)
        choices.append(
            {
                "task": task,
                "budget": budget,
                "selector": selector,
                "layers": choice.placement,
                "placements": choice.n_evaluated,
                "tokens": choice.n_tokens,
            }
        )
    wanted = {choice["layers"] for choice in choices}
    for budget in range(study.max_budget + 1, study.select_budget + 1):
        wanted |= {uniform(n_layers, budget), *random_placements(n_layers, budget, N_DRAWS)}
    if missing := sorted(wanted - set(tables["test"])):
        tables["test"] |= evaluate(model, block, papers["test"], missing, "placements, chosen")
    return PlacementRun(
        name,
        teacher,
        n_layers,
        study.max_budget,
        study.beam_width,
        tables,
        full,
        by_placement,
        live.logit_errors,
        tokens,
        choices,
    )


def search(study: PlacementStudy, teachers: list[str], weights_dir: str | Path) -> list[PlacementRun]:
    """Score every placement of up to `max_budget` layers on each supernet of each teacher, side by side.

    With several GPUs one supernet after the other, its placements split over them.
    """
    every, on = members(study.supernet, teachers, weights_dir), devices(study.common.device)
    work = partial(_search, study=study, on=on)
    return parallel_map(work, every, n_workers=1 if len(on) > 1 else None, n_threads=study.common.n_threads)
