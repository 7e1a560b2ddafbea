"""Specification of the divergence on text: Kullback and Leibler's, token by token, padding left out."""

import numpy as np
import pytest
import torch

from jetlab.evaluate.divergence import text_divergence, token_rows
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


def test_a_teacher_does_not_differ_from_itself(model, texts):
    found = text_divergence(model, texts, [TEACHER, *PLACEMENTS], TEACHER)
    np.testing.assert_array_equal(found[TEACHER], np.zeros(3))


def test_a_row_holds_all_of_an_example(tasks, tokenizer, texts):
    (example,) = tasks["text"].examples("test", 1, 0)
    assert tokenizer.decode(texts[0]) == example.context + example.questions[0].answer


def test_a_text_without_anything_to_predict_is_refused(model):
    with pytest.raises(ValueError, match="2 tokens or more, got 1"):
        text_divergence(model, [[3, 4], [5]], PLACEMENTS, TEACHER)
