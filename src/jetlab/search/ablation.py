"""Supernets that differ in one thing each: the law that draws paths, a term of the loss, or the layer-local phase.

Sec 2.2 of the paper (arXiv:2508.15884) trains one path a step by feature distillation; it prints neither the law that draws
the path nor the weights of the loss. What a change does is judged by what the supernet is for: the scores of
placements, and the placement that a search chooses from them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np

from jetlab.config import AblationStudy, SupernetStudy, Training
from jetlab.evaluate.suite import exam, paired_difference
from jetlab.parallel import parallel_map
from jetlab.paths import resolve
from jetlab.search import supernet as supernets
from jetlab.search.selectors import (
    Placement,
    ScoreTable,
    all_placements,
    evaluate,
    objective,
    random_mean,
    rank_correlation,
)
from jetlab.tasks import SCORED
from jetlab.train.paths import LAWS

SPLITS = ("search", "test")
SEED_STEP = 100  # as the seeds of one teacher's supernets in `supernet.members`


@dataclass(frozen=True)
class AblationRun:
    """One trained supernet: `tables` maps split to {placement: {task: Score}}, `n_tokens` counts those of its training."""

    variant: str
    teacher: str
    n_layers: int
    n_tokens: int
    tables: dict[str, ScoreTable]


def variant(study: SupernetStudy, name: str) -> SupernetStudy:
    """The base `study` with the one change that `name` stands for, measured at its end only.

    The name of a law draws paths by it. `no_features` and `no_logits` leave out a term of the loss, `no_local` the
    layer-local phase, whose steps are added to those end to end: contexts then grow, and the learning rate falls, over
    shares of the longer phase, so contexts of a step are not those of the base. `no_local_no_growth` has them at full size
    from the first step, as the layer-local phase of the base has. `another_seed` changes nothing here: `train` gives it
    other initial weights, data and paths.
    Raises ValueError for another name, ConfigError if nothing is left to train.
    """
    training = study.training
    changes = {"no_features": {"feature_weight": 0.0}, "no_logits": {"logit_weight": 0.0}, "another_seed": {}}
    changes["no_local"] = {"n_local": 0, "n_steps": training.n_local + training.n_steps}
    changes["no_local_no_growth"] = changes["no_local"] | {"growth": 0.0}
    if name not in LAWS and name not in changes:
        raise ValueError(f"a variant must be one of {', '.join((*LAWS, *changes))}, got {name!r}")
    changed = {"n_checks": 0, "training": Training.from_params(**training.model_dump() | changes.get(name, {}))}
    return study.model_copy(update=changed | ({"law": name} if name in LAWS else {}))


def train(member: tuple[str, str, str, int], study: AblationStudy) -> list[AblationRun]:
    """Every variant of one teacher, trained and evaluated; `member` as from `supernet.members`."""
    teacher_name, teacher, weights, seed = member
    runs = []
    for name in study.variants:
        changed = variant(study.supernet, name)
        file = Path(weights).with_stem(f"paths_{name}_{teacher_name}")
        own_seed = seed + SEED_STEP * (name == "another_seed")
        history = supernets.train(changed, f"{name} {teacher_name}", teacher, str(file), own_seed).history
        model, tokenizer = supernets.load(changed, teacher, file)
        n_layers = model.config.num_hidden_layers
        placements = all_placements(n_layers, study.budget)
        tables = {}
        for split in SPLITS:
            paper = exam(study.tasks, tokenizer, split, study.common.seed, SCORED)
            tables[split] = evaluate(model, changed.block, paper, placements, f"{name} {teacher_name}, {split}")
        runs.append(AblationRun(name, teacher_name, n_layers, history[-1]["tokens"], tables))
    return runs


def ablate(study: AblationStudy, out_dir: str | Path) -> list[AblationRun]:
    """Every variant on every teacher, teachers side by side; the weights of the new paths are left in `out_dir`.

    Variants of one teacher share initial weights and, but for `another_seed`, the seed of the rows of each step; without
    the layer-local phase the size of contexts grows otherwise (`variant`), and rows of another size are other rows.
    """
    teachers = [str(resolve(folder)) for folder in study.teachers]
    one_each = study.supernet.model_copy(update={"n_seeds": 1})
    members = supernets.members(one_each, teachers, out_dir)
    by_teacher = parallel_map(partial(train, study=study), members, n_threads=study.common.n_threads)
    return [run for runs in by_teacher for run in runs]


def best(table: ScoreTable, n_layers: int, budget: int, task: str) -> Placement:
    """The placement of `budget` full layers with the highest objective; ties go to the smaller layers."""
    return min(combinations(range(n_layers), budget), key=lambda full: (-objective(table[full], task), full))


def compare(runs: Sequence[AblationRun], budget: int) -> list[dict]:
    """A row for each run and scored task: what the variant scores, what it chooses, and how both differ from the base.

    The base is a teacher's first run. Accuracies are of split `test`, with standard errors over contexts:
    `all_linear`; `mean` over all placements of `budget` layers; `found`, the placement `layers` that this
    supernet's own scores on split `search` choose. `…_change` is the variant less the base, paired over contexts.
    `regret` is s(base's choice) − s(variant's choice), both scored **by the base**, paired: what a search on the variant
    would have lost there; it can fall below 0, since choices are made on other examples. `spearman` is the rank
    correlation, over placements of `budget` layers on split `search`, of the objectives under variant and base.
    """
    bases, rows = {}, []
    for run in runs:
        base = bases.setdefault(run.teacher, run)
        every = list(combinations(range(run.n_layers), budget))
        for task in SCORED:
            search, test = run.tables["search"], run.tables["test"]
            chosen, base_chosen = (best(r.tables["search"], r.n_layers, budget, task) for r in (run, base))
            all_linear, found = test[()][task], test[chosen][task]
            by_base = base.tables["test"]
            mean, mean_se, n = random_mean(test[full][task] for full in every)
            changes = {
                "all_linear_change": paired_difference(all_linear, by_base[()][task]),
                "found_change": paired_difference(found, by_base[base_chosen][task]),
                "regret": paired_difference(by_base[base_chosen][task], by_base[chosen][task]),
            }
            maps = ([objective(table[full], task) for full in every] for table in (search, base.tables["search"]))
            row = {
                "variant": run.variant,
                "teacher": run.teacher,
                "task": task,
                "all_linear": all_linear.value,
                "all_linear_se": all_linear.se,
                "mean": mean,
                "mean_se": mean_se,
                "layers": " ".join(map(str, chosen)),
                "found": found.value,
                "found_se": found.se,
            }
            for name, (value, se, _) in changes.items():
                row |= {name: value, f"{name}_se": se}
            rows.append(row | {"spearman": rank_correlation(*maps), "n": n, "tokens": run.n_tokens})
    return rows


def over_teachers(rows: Sequence[dict]) -> list[dict]:
    """The numbers of `compare` for each variant and task, averaged over teachers; `…_se` too, and `n_same` choices.

    Teachers answer the same contexts, so the mean standard error is kept: an upper bound for that of the mean.
    `n_same` counts the teachers for which the variant chose the base's `layers`.
    """
    first, groups = {}, {}
    for row in rows:
        first.setdefault((row["teacher"], row["task"]), row["layers"])
        groups.setdefault((row["variant"], row["task"]), []).append(row)
    numbers = [key for key in rows[0] if key not in ("variant", "teacher", "task", "layers")]
    means = []
    for (name, task), group in groups.items():
        same = sum(row["layers"] == first[row["teacher"], task] for row in group)
        mean = {key: float(np.mean([row[key] for row in group])) for key in numbers}
        means.append({"variant": name, "task": task, **mean, "n_same": same, "n_teachers": len(group)})
    return means
