"""Specification of the selectors on score functions that are known in closed form."""

from itertools import combinations
from math import comb
from typing import get_args

import numpy as np
import pytest

from jetlab.config import Selector
from jetlab.evaluate.suite import Score
from jetlab.search.selectors import (
    SELECTORS,
    all_placements,
    objective,
    random_mean,
    random_placement,
    random_placements,
    rank_correlation,
    sampling_error,
    select,
    uniform,
)

N_LAYERS = 8


class Toy:
    """A supernet whose scores are a function of the placement; 10 tokens a score, 3 and 7 where it is kl and logit_error."""

    n_layers = N_LAYERS

    def __init__(self, score, divergence=None, gates=None, error=None):
        self.score, self.divergence, self.trained, self.error = score, divergence, gates, error

    def scores(self, placements, objective):
        distances = {"kl": lambda full: self.divergence[full], "logit_error": self.error}
        if objective in distances:
            return {full: -distances[objective](full) for full in placements}
        return {full: self.score(full) for full in placements}

    def n_tokens(self, objective):
        return {"kl": 3, "logit_error": 7}.get(objective, 10)

    def gates(self, budget, objective):
        return self.trained, 1000


def choose(name, score, n_layers, budget, **options):
    assert n_layers == N_LAYERS
    return select(Toy(score), budget, "math", selector=name, **options)


def random_score(seed):
    """A score without any structure: one number for each placement."""
    rng = np.random.default_rng(seed)
    table = {full: float(rng.random()) for full in all_placements(N_LAYERS, 3)}
    return table.__getitem__


def counted(score):
    """`score`, and the placements that it was asked for."""
    asked = []

    def ask(full):
        asked.append(full)
        return score(full)

    return ask, asked


def additive(full):
    """Every layer brings its own number; layer 3 the most, then 6, then 0."""
    return sum((2, 0, 1, 9, 0, 1, 5, 1)[layer] for layer in full)


def interacting(full):
    """Layers 1 and 4 are worth much together and little alone, where 7 and then 2 lead."""
    return 10.0 * ({1, 4} <= set(full)) + sum({7: 3.0, 2: 2.5, 1: 2.0}.get(layer, 0.0) for layer in full)


@pytest.mark.parametrize("budget", [1, 2, 3])
@pytest.mark.parametrize("seed", range(5))
def test_greedy_is_a_beam_of_width_one(seed, budget):
    score = random_score(seed)
    assert choose("greedy_add", score, N_LAYERS, budget) == choose("beam", score, N_LAYERS, budget, width=1)


@pytest.mark.parametrize("budget", [1, 2, 3])
@pytest.mark.parametrize("seed", range(5))
def test_exhaustive_search_finds_the_maximum_and_looks_at_everything(seed, budget):
    score = random_score(seed)
    choice = choose("exhaustive", score, N_LAYERS, budget)
    assert choice.value == max(score(full) for full in combinations(range(N_LAYERS), budget))
    assert choice.n_evaluated == comb(N_LAYERS, budget)


@pytest.mark.parametrize("name", ["beam", "greedy_add", "single_layer", "exhaustive"])
def test_without_interaction_every_search_finds_the_best_layers(name):
    assert [choose(name, additive, N_LAYERS, k).placement for k in (1, 2, 3)] == [(3,), (3, 6), (0, 3, 6)]


def test_a_beam_finds_what_looking_at_single_layers_misses():
    assert choose("single_layer", interacting, N_LAYERS, 2).placement == (2, 7)
    assert choose("greedy_add", interacting, N_LAYERS, 2).placement == (2, 7)
    beam, best = (choose(name, interacting, N_LAYERS, 2, width=3) for name in ("beam", "exhaustive"))
    assert beam.placement == best.placement == (1, 4)
    assert beam.n_evaluated < best.n_evaluated


def test_a_beam_as_wide_as_the_model_sees_every_pair():
    for seed in range(5):
        score = random_score(seed)
        beam, best = (choose(name, score, N_LAYERS, 2, width=N_LAYERS) for name in ("beam", "exhaustive"))
        assert beam.placement == best.placement
        assert beam.n_evaluated == N_LAYERS + comb(N_LAYERS, 2)


@pytest.mark.parametrize("width", [1, 2, 3, 8])
def test_a_beam_asks_for_eight_placements_then_seven_for_each_kept(width):
    score, asked = counted(random_score(0))
    assert choose("beam", score, N_LAYERS, 1, width=width).n_evaluated == 8
    choice = choose("beam", score, N_LAYERS, 2, width=width)
    # two kept layers share the pair of both, which is asked for once
    assert choice.n_evaluated == 8 + 7 * width - comb(width, 2)
    assert max(map(len, asked)) == 2


@pytest.mark.parametrize("budget", [1, 2, 3])
def test_single_layer_looks_at_single_layers_only_and_uniform_at_nothing(budget):
    assert choose("single_layer", random_score(1), N_LAYERS, budget).n_evaluated == 8
    choice = choose("uniform", random_score(1), N_LAYERS, budget)
    assert choice.n_evaluated == 0 and choice.value == random_score(1)(choice.placement)


@pytest.mark.parametrize(("budget", "layers"), [(1, (4,)), (2, (2, 6)), (4, (1, 3, 5, 7)), (8, tuple(range(8)))])
def test_the_uniform_rule_spreads_the_layers(budget, layers):
    assert uniform(8, budget) == layers


def test_greedy_removal_keeps_what_it_cannot_do_without():
    for k in (1, 2, 3):
        assert (
            choose("greedy_remove", additive, N_LAYERS, k).placement
            == choose("exhaustive", additive, N_LAYERS, k).placement
        )
    # with all others there, 1 and 4 are worth most: removal finds the pair that adding layers one by one misses
    choice = choose("greedy_remove", interacting, N_LAYERS, 2)
    assert choice.placement == (1, 4)
    assert choice.n_evaluated == 8 + 7 + 6 + 5 + 4 + 3


def test_divergence_ranks_layers_whatever_the_task_and_is_paid_for_in_its_own_tokens():
    divergence = {(layer,): abs(layer - 5) + 0.1 * layer for layer in range(N_LAYERS)}
    choice = select(Toy(additive, divergence), 3, "math", selector="kl")
    assert choice.placement == (4, 5, 6)
    assert choice.value == additive((4, 5, 6))
    assert (choice.n_evaluated, choice.n_tokens) == (8, 8 * 3)


def standing_in(full):
    """Each layer given up adds its own error, and 2 and 5 stand in for each other: both gone add 10 more."""
    gone = set(range(N_LAYERS)) - set(full)
    return sum((5, 1, 0.1, 7, 2, 0.2, 3, 1.5)[layer] for layer in gone) + 10.0 * ({2, 5} <= gone)


def test_the_layer_whose_loss_changes_the_logits_least_goes_first():
    error, asked = counted(standing_in)
    supernet = Toy(additive, error=error)
    # 2 goes, which makes 5 dear; then 1, 7, 4, 6, 0 and 3. The two largest errors of single layers are those of 3 and 0
    assert [select(supernet, k, "math", selector="logit_error").placement for k in (7, 6, 2, 1)] == [
        (0, 1, 3, 4, 5, 6, 7), (0, 3, 4, 5, 6, 7), (3, 5), (5,),
    ]  # fmt: skip
    assert min(map(len, asked)) == 1 and max(map(len, asked)) == N_LAYERS - 1


@pytest.mark.parametrize(("budget", "n_evaluated"), [(8, 0), (7, 8), (2, 33), (1, 35)])
def test_logit_error_looks_at_what_is_left_without_each_layer_and_pays_in_its_own_tokens(budget, n_evaluated):
    error, asked = counted(standing_in)
    choice = select(Toy(additive, error=error), budget, "math", selector="logit_error")
    assert len(asked) == len(set(asked)) == choice.n_evaluated == n_evaluated
    assert choice.n_tokens == 7 * n_evaluated


def test_logit_error_ignores_the_objective_and_reports_its_score():
    score, asked = counted(additive)
    for task in ("math", "knowledge", "all"):
        choice = select(Toy(score, error=standing_in), 2, task, selector="logit_error")
        assert (choice.placement, choice.value) == ((3, 5), additive((3, 5)))
    assert asked == [(3, 5)] * 3


def test_a_study_may_ask_for_every_selector():
    assert get_args(Selector) == SELECTORS


def test_the_largest_gates_are_chosen_and_their_training_is_the_cost():
    choice = select(Toy(additive, gates=[0.1, 0.9, 0.0, 0.2, 0.8, 0.9, 0.1, 0.0]), 3, "math", selector="gates")
    assert choice.placement == (1, 4, 5)
    assert (choice.n_evaluated, choice.n_tokens) == (0, 1000)


def test_random_draws_every_layer_and_depends_on_its_seed_alone():
    drawn = [choose("random", additive, N_LAYERS, 2, seed=seed).placement for seed in range(40)]
    assert drawn == [choose("random", additive, N_LAYERS, 2, seed=seed).placement for seed in range(40)]
    assert {layer for full in drawn for layer in full} == set(range(N_LAYERS)) and len(set(drawn)) > 15


def test_cost_counts_placements_and_the_tokens_that_they_read():
    choice = choose("beam", random_score(0), N_LAYERS, 2, width=3)
    assert choice.n_tokens == 10 * choice.n_evaluated
    assert choose("uniform", random_score(0), N_LAYERS, 2).n_tokens == 0


def test_ties_go_to_the_smaller_layers():
    for name in ("beam", "greedy_add", "single_layer", "exhaustive"):
        assert choose(name, lambda full: 0.0, N_LAYERS, 2).placement == (0, 1)


@pytest.mark.parametrize("budget", [0, 9, -1])
def test_a_budget_that_does_not_fit_is_refused(budget):
    with pytest.raises(ValueError, match=rf"budget must be 1 … 8 full layers, got {budget}"):
        select(Toy(additive), budget, "math")


@pytest.mark.parametrize("width", [0, -1])
def test_a_beam_without_width_is_refused(width):
    with pytest.raises(ValueError, match=f"keeps at least 1 placement, got width {width}"):
        select(Toy(additive), 2, "math", width=width)


def test_an_unknown_selector_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"single_layer, beam, greedy_add, .* exhaustive, got 'best'"):
        choose("best", additive, N_LAYERS, 1)


def test_all_placements_up_to_two_layers_are_thirty_seven():
    found = all_placements(8, 2)
    assert len(found) == len(set(found)) == 1 + 8 + 28 and found[0] == ()


def score(name, correct, loss=0.0):
    correct = np.array(correct)
    return Score(name, "accuracy", 0.1, correct, np.full(len(correct), loss), len(correct))


def test_a_random_placement_scores_the_mean_over_placements_with_its_error_over_contexts():
    value, se, n = random_mean([score("math", [0.2, 0.6]), score("math", [0.4, 1.0])])
    assert (value, n) == (pytest.approx(0.55), 2)
    assert se == pytest.approx(0.25)  # of 0.3 and 0.8: sd 0.5 / √2, over √2


def test_random_placements_are_drawn_evenly_and_by_the_seed():
    drawn = [random_placement(4, 2, seed) for seed in range(600)]
    assert drawn == [random_placement(4, 2, seed) for seed in range(600)]
    shares = {full: drawn.count(full) / 600 for full in combinations(range(4), 2)}
    assert sum(shares.values()) == pytest.approx(1) and all(
        abs(s - 1 / 6) < 4 * (5 / 36 / 600) ** 0.5 for s in shares.values()
    )


def test_a_sample_of_placements_holds_none_twice_and_all_where_there_are_no_more():
    drawn = random_placements(8, 4, 16)
    assert len(drawn) == len(set(drawn)) == 16 and all(len(set(full)) == 4 for full in drawn)
    assert drawn == random_placements(8, 4, 16)
    assert random_placements(4, 3, 16) == list(combinations(range(4), 3))


def test_the_error_of_sampling_is_zero_once_everything_is_drawn():
    assert sampling_error([0.0, 2.0], 4) == pytest.approx(0.5**0.5)  # sd √2, over √2, times √(1 − 2/4)
    assert sampling_error([0.0, 2.0], 2) == 0.0


def test_a_search_maximises_accuracy_or_minus_the_loss():
    scores = {"math": score("math", [0.5, 0.7]), "knowledge": score("knowledge", [1.0], loss=0.4)}
    assert objective(scores, "math") == pytest.approx(0.6)
    assert objective(scores, "knowledge") == pytest.approx(-0.4)


def test_all_tasks_at_once_count_from_chance_to_the_teacher():
    names = ("knowledge", "math", "retrieval", "code")
    scores = {name: score(name, [value]) for name, value in zip(names, (0.1, 0.5, 0.9, 0.3), strict=True)}
    # (0 + 0.5 + 1 + 0.25) / 4
    assert objective(scores, "all", dict.fromkeys(names, 0.9)) == pytest.approx(0.4375)


@pytest.mark.parametrize(
    ("a", "b", "rho"),
    [
        pytest.param([1, 2, 3, 4], [10, 20, 25, 100], 1.0, id="same-order"),
        pytest.param([1, 2, 3, 4], [8, 4, 2, 1], -1.0, id="reversed"),
        pytest.param([1, 2, 3, 4, 5], [2, 1, 4, 3, 5], 0.8, id="1-minus-6-times-4-over-120"),
        pytest.param([1, 2, 2, 3], [1, 2, 3, 4], 4.5 / (4.5 * 5) ** 0.5, id="ties-share-their-mean-rank"),
        pytest.param([1, 1, 1], [1, 2, 3], 0.0, id="constant"),
    ],
)
def test_rank_correlation_equals_spearmans(a, b, rho):
    assert rank_correlation(a, b) == pytest.approx(rho)
