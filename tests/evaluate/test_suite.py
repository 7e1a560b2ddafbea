"""Specification of the scorer: carrying the state over is a short cut, never another result."""

import math

import numpy as np
import pytest
import torch
from transformers import NemotronHConfig, NemotronHForCausalLM

from jetlab.evaluate.suite import Exam, Score, normalised, paired_difference, standard_error
from jetlab.layers.dims import BlockDims
from jetlab.models import surgery
from jetlab.paths import ROOT
from jetlab.tasks import Example, Question
from jetlab.train.paths import placement_kinds

N_CONTEXTS, N_QUESTIONS = 4, 3


@pytest.fixture(scope="module", params=["teacher", "hybrid"])
def model(request):
    """The bundled teacher, and a hybrid of it whose linear layers are as they start."""
    model, _ = surgery.load(ROOT / "assets/teacher/0")
    if request.param == "teacher":
        return surgery.attach(model)
    torch.manual_seed(0)
    kinds = ["gated_deltanet", "jetblock", "attention", "gated_deltanet"] * 2
    return surgery.convert(model, kinds, BlockDims(64, 2, 16, 16))


@pytest.fixture(scope="module")
def exam(tasks, tokenizer):
    return Exam(tasks.values(), tokenizer, "test", N_CONTEXTS, 0, n_questions=N_QUESTIONS)


@torch.no_grad()
def log_likelihood(model, tokenizer, given, text):
    """Σ log p of the tokens of `text` after `given`, and whether greedy decoding gives them; one pass, no cache."""
    whole = tokenizer(given + text).input_ids
    start = len(tokenizer(given).input_ids)
    hidden = model.model(input_ids=torch.tensor([whole]), use_cache=False).last_hidden_state
    log_p = model.lm_head(hidden)[0, start - 1 : -1].log_softmax(-1)
    target = torch.tensor(whole[start:])
    return float(log_p.gather(1, target[:, None]).sum()), bool((log_p.argmax(-1) == target).all())


def alone(model, tokenizer, task):
    """Score by the definition: each question alone behind its whole context."""
    correct, loss, greedy = [], [], []
    for example in task.examples("test", N_CONTEXTS, 0):
        rows = []
        for question in example.questions[:N_QUESTIONS]:
            given = example.context + question.prompt
            log_p, is_greedy = log_likelihood(model, tokenizer, given, question.answer)
            if task.metric == "bits_per_char":
                bits = -log_p / math.log(2) / len(question.answer)
                rows.append((bits, bits, is_greedy))
                continue
            right = is_greedy
            if question.choices:
                by_choice = {c: log_likelihood(model, tokenizer, given, c)[0] for c in question.choices}
                right = max(by_choice, key=by_choice.get) == question.answer
            rows.append((right, -log_p, is_greedy))
        for column, values in zip((correct, loss, greedy), zip(*rows, strict=True), strict=True):
            column.append(np.mean(values))
    return np.array(correct), np.array(loss), np.array(greedy)


@pytest.mark.parametrize("name", ["knowledge", "math", "retrieval", "code", "facts", "text"])
def test_carrying_the_state_over_equals_reading_everything_anew(name, model, exam, tasks, tokenizer):
    score = exam.score(model)[name]
    correct, loss, _ = alone(model, tokenizer, tasks[name])
    if tasks[name].metric == "accuracy":
        np.testing.assert_array_equal(score.correct, correct)
    np.testing.assert_allclose(score.loss, loss, atol=1e-4)  # fp32: the order of sums differs


def test_bits_per_character_are_both_score_and_loss(model, exam):
    score = exam.score(model)["text"]
    assert score.metric == "bits_per_char" and score.n_questions == N_CONTEXTS
    np.testing.assert_array_equal(score.correct, score.loss)


def test_choices_are_weighed_against_each_other_only(model, exam, tasks, tokenizer):
    """A choice may win although a word that is no choice is likelier still."""
    score = exam.score(model)["knowledge"]
    _, _, greedy = alone(model, tokenizer, tasks["knowledge"])
    assert (score.correct >= greedy).all()


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_batch_size_changes_nothing(batch_size, model, exam):
    expected, found = exam.score(model), exam.score(model, batch_size=batch_size)
    for name, score in expected.items():
        np.testing.assert_allclose(found[name].loss, score.loss, atol=1e-4)
        if score.metric == "accuracy":
            np.testing.assert_array_equal(found[name].correct, score.correct)


def test_scoring_leaves_the_model_as_it_was(model, exam):
    before = {name: x.clone() for name, x in model.state_dict().items()}
    model.train()
    exam.score(model)
    assert model.training
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    model.eval()


def test_more_contexts_begin_with_the_same_ones(model, tasks, tokenizer):
    few, many = (Exam([tasks["retrieval"]], tokenizer, "select", n, 5, n_questions=2).score(model) for n in (2, 5))
    np.testing.assert_allclose(few["retrieval"].loss, many["retrieval"].loss[:2], atol=1e-4)


@pytest.fixture(scope="module")
def supernet():
    """The bundled teacher with an untrained linear path in each layer, and five placements of it."""
    model, _ = surgery.load(ROOT / "assets/teacher/0")
    torch.manual_seed(0)
    surgery.wrap(model, "gated_deltanet", BlockDims(64, 2, 16, 16))
    return model, [placement_kinds(8, full, "gated_deltanet") for full in ((), (4,), (0, 7), (0, 6), tuple(range(8)))]


def assert_same_scores(found, expected):
    assert list(found) == list(expected)
    for name, score in expected.items():
        np.testing.assert_allclose(found[name].loss, score.loss, atol=1e-5)  # fp32: more rows sum in another order
        if score.metric == "accuracy":
            np.testing.assert_array_equal(found[name].correct, score.correct)


@pytest.fixture(scope="module")
def one_by_one(supernet, exam):
    model, architectures = supernet
    scores = {}
    for kinds in architectures:
        surgery.activate(model, kinds)
        scores[kinds] = exam.score(model)
    return scores


# All at once; fewer contexts at a time; and with 8 rows for one context's 3 questions, two architectures at a time.
@pytest.mark.parametrize("max_rows", [2048, 40, 8])
def test_all_architectures_at_once_have_the_scores_of_each(max_rows, supernet, exam, one_by_one):
    model, architectures = supernet
    scores = exam.score_all(model, architectures, max_rows=max_rows)
    assert list(scores) == architectures
    for kinds, expected in one_by_one.items():
        assert_same_scores(scores[kinds], expected)


@pytest.mark.parametrize("max_rows", [60, 31, 7])
def test_a_forward_holds_no_more_rows_than_allowed(max_rows, supernet, exam):
    model, architectures = supernet
    n_rows = []
    handle = surgery.decoder(model).register_forward_hook(lambda _m, _x, y: n_rows.append(len(y.last_hidden_state)))
    exam.score_all(model, architectures, max_rows=max_rows)
    handle.remove()
    assert max_rows / 2 < max(n_rows) <= max_rows


def test_every_prediction_goes_through_the_head_once(supernet, tokenizer, tasks):
    """The choices of a question are read off one distribution, at the one place where they all begin."""
    model, architectures = supernet
    n_predictions = []
    handle = model.lm_head.register_forward_hook(lambda _m, _x, y: n_predictions.append(y[..., 0].numel()))
    Exam([tasks["knowledge"]], tokenizer, "test", 2, 0, n_questions=3).score_all(model, architectures)
    handle.remove()
    assert sum(n_predictions) == 2 * 3 * len(architectures)


class _Splits:
    """A tokeniser of single letters, so that choices have several tokens."""

    def __call__(self, text, add_special_tokens=False):
        return type("Encoding", (), {"input_ids": [2 + ord(letter) % 256 for letter in text]})


def test_choices_of_several_tokens_are_judged_by_their_whole_likelihood(model, tasks):
    exam = Exam([tasks["knowledge"]], _Splits(), "test", 2, 0, n_questions=2)
    score = exam.score(model)["knowledge"]
    correct = []
    for example in tasks["knowledge"].examples("test", 2, 0):
        right = []
        for question in example.questions[:2]:
            given = example.context + question.prompt
            by_choice = {c: log_likelihood(model, _Splits(), given, c)[0] for c in question.choices}
            right.append(max(by_choice, key=by_choice.get) == question.answer)
        correct.append(np.mean(right))
    np.testing.assert_array_equal(score.correct, correct)


def nemotron_h(vocab_size, pattern):
    """A small Nemotron-H with random weights, large enough that dt falls below time_step_min at a good part of the tokens."""
    torch.manual_seed(0)
    config = NemotronHConfig(
        vocab_size=vocab_size, hidden_size=32, hybrid_override_pattern=pattern, num_attention_heads=2, head_dim=16,
        num_key_value_heads=1, intermediate_size=48, mamba_num_heads=4, mamba_head_dim=8, n_groups=2, ssm_state_size=8,
        chunk_size=8, initializer_range=0.3, time_step_min=0.01,
    )  # fmt: skip
    return NemotronHForCausalLM(config).eval()


@pytest.fixture(scope="module", params=["M-M*-", "M-MM-", "*-*-"], ids=["hybrid", "mamba-alone", "attention-alone"])
def nemotron(request, tokenizer):
    return nemotron_h(len(tokenizer), request.param)


@pytest.mark.parametrize("name", ["knowledge", "math", "retrieval", "code", "facts", "text"])
def test_a_model_without_slots_carries_its_state_over_too(name, nemotron, exam, tasks, tokenizer):
    score = exam.score(nemotron)[name]
    correct, loss, _ = alone(nemotron, tokenizer, tasks[name])
    if tasks[name].metric == "accuracy":
        np.testing.assert_array_equal(score.correct, correct)
    np.testing.assert_allclose(score.loss, loss, rtol=1e-5, atol=1e-4)  # fp32: the order of sums differs


@pytest.mark.parametrize("batch", [{"batch_size": 1}, {"batch_size": 3}, {"max_rows": 7}])
def test_the_batch_changes_nothing_without_slots_either(batch, nemotron, exam):
    expected, n_rows = exam.score(nemotron), []
    handle = nemotron.model.register_forward_hook(lambda _m, _x, y: n_rows.append(len(y.last_hidden_state)))
    found = exam.score(nemotron, **batch)
    handle.remove()
    assert_same_scores(found, expected)
    assert max(n_rows) <= batch.get("max_rows", batch.get("batch_size", N_CONTEXTS) * N_QUESTIONS)


class _Completion:
    """A task whose questions have no prompt: behind the context only its own last token is left to read."""

    name, metric, chance = "completion", "accuracy", 0.0

    def examples(self, split, n, seed):
        return [Example(f"<math> {digit} 3 1 4", (Question("", " 5"),)) for digit in range(n)]


def test_a_lone_token_is_not_read_by_the_step_that_does_not_clamp_dt(nemotron, tokenizer):
    score = Exam([_Completion()], tokenizer, "test", 3, 0).score(nemotron)["completion"]
    loss = [-log_likelihood(nemotron, tokenizer, f"<math> {digit} 3 1 4", " 5")[0] for digit in range(3)]
    np.testing.assert_allclose(score.loss, loss, rtol=1e-5)


def test_slots_change_no_score(exam):
    model, _ = surgery.load(ROOT / "assets/teacher/0")
    plain = exam.score(model)
    assert_same_scores(exam.score(surgery.attach(model)), plain)


def score_of(*correct):
    return Score("math", "accuracy", 0.1, np.array(correct), np.zeros(len(correct)), 12 * len(correct))


def test_the_standard_error_counts_contexts_not_questions():
    score = score_of(0.5, 1.0, 0.75, 0.25)
    assert score.value == pytest.approx(0.625)
    # deviations -.125 .375 .125 -.375: squares sum to .3125; √(.3125 / 3) / √4
    assert score.se == pytest.approx(0.16137430609)
    assert standard_error(np.array([0.3])) == 0.0


def test_a_paired_difference_knows_that_both_saw_the_same_contexts():
    mean, se, n = paired_difference(score_of(0.9, 0.5, 0.1), score_of(0.8, 0.4, 0.0))
    assert (mean, se, n) == (pytest.approx(0.1), pytest.approx(0.0, abs=1e-9), 3)
    with pytest.raises(ValueError, match="same contexts, got 2 and 1"):
        paired_difference(score_of(0.1, 0.2), score_of(0.1))


def test_normalised_scores_run_from_guessing_to_the_teacher():
    assert normalised(score_of(0.1), ceiling=0.9) == pytest.approx(0.0)
    assert normalised(score_of(0.9), ceiling=0.9) == pytest.approx(1.0)
    assert normalised(score_of(0.3), ceiling=0.9) == pytest.approx(0.25)


@pytest.mark.slow
def test_lm_eval_gives_the_same_scores_to_the_last_example(model, exam, tasks, sizes, tokenizer):
    from jetlab.config import Tasks
    from jetlab.evaluate.harness import score_with_lm_eval

    n_contexts = {"search": 1, "select": 1, "test": 1}
    study = Tasks(seq_len=64, sizes=sizes, n_contexts=n_contexts, n_questions=N_QUESTIONS)
    found = score_with_lm_eval(model, tokenizer, study, N_CONTEXTS, 0, names=tuple(tasks))
    assert set(found) == set(tasks) and model.config.use_cache
    for name, ours in exam.score(model).items():
        exact = {"rel": 0, "abs": 1e-12} if ours.metric == "accuracy" else {"abs": 1e-4}  # fp32 sums
        assert found[name]["value"] == pytest.approx(ours.value, **exact)
        assert found[name]["se"] == pytest.approx(ours.se, **exact)
        assert found[name]["n"] == N_CONTEXTS
        assert found[name]["contexts"] == pytest.approx(ours.correct, **exact)


@pytest.mark.slow
def test_lm_eval_is_quiet_and_leaves_the_global_generators_alone(model, tasks, sizes, tokenizer, capfd):
    from jetlab.config import Tasks
    from jetlab.evaluate.harness import score_with_lm_eval

    study = Tasks(seq_len=64, sizes=sizes, n_contexts={"search": 1, "select": 1, "test": 1}, n_questions=1)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    score_with_lm_eval(model, tokenizer, study, 1, 0, names=("math",))
    torch.testing.assert_close(torch.rand(1), expected)
    assert capfd.readouterr() == ("", "")
    with pytest.raises(ValueError, match=r"knowledge, math.*got maths"):
        score_with_lm_eval(model, tokenizer, study, 1, 0, names=("maths",))
