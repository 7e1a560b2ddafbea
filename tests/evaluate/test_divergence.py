"""Specification of the distances from the teacher: Kullback and Leibler's on text, and the squared error of logits."""

import numpy as np
import pytest
import torch

from jetlab.evaluate.divergence import logit_error, text_divergence, token_rows
from jetlab.layers.dims import BlockDims
from jetlab.models import surgery
from jetlab.paths import ROOT
from jetlab.train.paths import placement_kinds

TEACHER = ("attention",) * 8
PLACEMENTS = [placement_kinds(8, full, "gated_deltanet") for full in ((), (3,), (2, 6))]


@pytest.fixture(scope="module")
def model():
    model, _ = surgery.load(ROOT / "assets/teacher/0")
    torch.manual_seed(0)
    return surgery.wrap(model, "gated_deltanet", BlockDims(64, 2, 16, 16))


@pytest.fixture(scope="module")
def texts(tasks, tokenizer):
    return token_rows(tasks["text"], tokenizer, "test", 3, 0)


@torch.no_grad()
def directly(model, kinds, text):
    """Mean over the tokens behind the first of Σ p (log p − log q), in fp64 behind the model."""

    def log_p(kinds):
        surgery.activate(model, kinds)
        return model(input_ids=torch.tensor([text])).logits[0, :-1].double().log_softmax(-1)

    p, q = log_p(TEACHER), log_p(kinds)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("max_rows", [128, 4])  # all texts at once; one at a time
def test_it_equals_the_definition_for_each_text_alone(max_rows, model, texts):
    assert len({len(text) for text in texts}) > 1
    found = text_divergence(model, texts, PLACEMENTS, TEACHER, max_rows=max_rows)
    assert list(found) == PLACEMENTS
    for kinds, values in found.items():
        expected = [directly(model, kinds, text) for text in texts]
        assert min(expected) > 0.1
        np.testing.assert_allclose(values, expected, rtol=1e-4)  # fp32 sums over the vocabulary


@pytest.mark.parametrize("distance", [text_divergence, logit_error])
def test_a_teacher_does_not_differ_from_itself(distance, model, texts):
    found = distance(model, texts, [TEACHER, *PLACEMENTS], TEACHER)
    np.testing.assert_array_equal(found[TEACHER], np.zeros(3))


@torch.no_grad()
def squared(model, kinds, row):
    """Mean over all tokens and the vocabulary of (z_teacher − z)², in fp64 behind the model."""

    def logits(kinds):
        surgery.activate(model, kinds)
        return model(input_ids=torch.tensor([row])).logits[0].double()

    return float((logits(TEACHER) - logits(kinds)).square().mean())


@pytest.mark.parametrize("max_rows", [128, 4])  # all rows at once; one at a time
def test_the_logit_error_equals_the_definition_for_each_row_alone(max_rows, model, texts):
    rows = [*texts, texts[0][:1]]  # the logits of a last token count, so one token is enough
    found = logit_error(model, rows, PLACEMENTS, TEACHER, max_rows=max_rows)
    assert list(found) == PLACEMENTS
    for kinds, values in found.items():
        expected = [squared(model, kinds, row) for row in rows]
        assert min(expected) > 0.1
        np.testing.assert_allclose(values, expected, rtol=1e-4)  # fp32 sums over the width and the vocabulary


def test_a_shift_of_all_logits_is_an_error_but_no_divergence(model, texts, monkeypatch):
    """A student that is the teacher but for 2 added to every logit."""
    head, calls = model.lm_head, []

    class Shifted(torch.nn.Module):
        def forward(self, hidden):
            calls.append(1)
            return head(hidden) + 2.0 * (len(calls) % 2 == 0)  # the teacher is read first

    monkeypatch.setattr(model, "lm_head", Shifted())
    errors = logit_error(model, texts, [TEACHER], TEACHER)[TEACHER]
    np.testing.assert_allclose(errors, 4.0, rtol=1e-5)  # fp32: a logit of ten keeps six digits
    np.testing.assert_allclose(text_divergence(model, texts, [TEACHER], TEACHER)[TEACHER], 0.0, atol=1e-5)


def test_a_row_holds_all_of_an_example(tasks, tokenizer, texts):
    (example,) = tasks["text"].examples("test", 1, 0)
    assert tokenizer.decode(texts[0]) == example.context + example.questions[0].answer


def test_a_text_without_anything_to_predict_is_refused(model):
    with pytest.raises(ValueError, match="2 tokens or more, got 1"):
        text_divergence(model, [[3, 4], [5]], PLACEMENTS, TEACHER)
    with pytest.raises(ValueError, match="1 tokens or more, got 0"):
        logit_error(model, [[3, 4], []], PLACEMENTS, TEACHER)


@pytest.mark.parametrize("distance", [text_divergence, logit_error])
def test_no_rows_are_refused(distance, model):
    with pytest.raises(ValueError, match="measured on rows of tokens, got none"):
        distance(model, [], PLACEMENTS, TEACHER)
