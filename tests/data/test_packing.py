"""Specification of packing: rows hold the text, the marks hold the answers, whatever the tokeniser."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from jetlab.data.packing import Mixture, pack
from jetlab.tasks import TASKS, Example, Question


def byte_tokenizer(*texts, n_merges=0):
    """A byte-level tokeniser that knows none of our words, with merges learned from `texts`."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=257 + n_merges, initial_alphabet=alphabet, special_tokens=["<pad>"], show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>")


def text_of(example):
    return example.context + "".join(q.prompt + q.answer for q in example.questions)


def answers_of(example):
    return "".join(q.answer for q in example.questions)


@pytest.fixture(params=["words", "bytes", "merges"])
def any_tokenizer(request, tasks, tokenizer):
    if request.param == "words":
        return tokenizer
    corpus = [text_of(e) for task in tasks.values() for e in task.examples("train", 20, seed=9)]
    return byte_tokenizer(*corpus, n_merges=0 if request.param == "bytes" else 150)


@pytest.mark.parametrize("name", TASKS)
def test_exactly_the_answers_are_marked(name, tasks, any_tokenizer):
    examples = tasks[name].examples("train", 4, seed=0)
    batch = pack(examples, any_tokenizer, 2000, [name] * 4)
    for example, ids, answer in zip(examples, batch.ids, batch.answer, strict=True):
        assert any_tokenizer.decode(ids[answer]) == answers_of(example)
        real = len(any_tokenizer(text_of(example)).input_ids)
        assert any_tokenizer.decode(ids[:real]) == text_of(example)
        assert (ids[real:] == any_tokenizer.pad_token_id).all() and not answer[real:].any()


def test_a_letter_of_several_bytes_is_marked_with_its_text(any_tokenizer):
    example = Example("<text> ça", (Question(" où", " là-bas 🙂"), Question(" é", " è")))
    batch = pack([example], any_tokenizer, 100, ["text"])
    assert any_tokenizer.decode(batch.ids[batch.answer]) == " là-bas 🙂 è"


def test_a_token_across_the_border_counts_by_its_last_character():
    merged = byte_tokenizer("kettleowl " * 50, n_merges=40)
    assert len(merged("kettleowl").input_ids) == 1
    batch = pack([Example("fox", (Question(" kettle", "owl"),))], merged, 20, ["retrieval"])
    assert merged.decode(batch.ids[batch.answer]) in (" kettleowl", "kettleowl")


@pytest.mark.parametrize("seq_len", [1, 2, 9, 17])
def test_a_long_row_is_cut_and_otherwise_the_same(seq_len, tasks, tokenizer):
    examples = tasks["retrieval"].examples("train", 3, seed=0)
    whole, cut = (pack(examples, tokenizer, n, ["retrieval"] * 3) for n in (400, seq_len))
    assert cut.ids.shape == (3, seq_len)
    torch.testing.assert_close(cut.ids, whole.ids[:, :seq_len])
    torch.testing.assert_close(cut.answer, whole.answer[:, :seq_len])


def test_the_first_token_is_never_to_be_predicted(tokenizer):
    batch = pack([Example("", (Question("", " fox owl"),))], tokenizer, 4, ["text"])
    assert batch.answer.tolist() == [[False, True, False, False]]


def test_targets_point_at_the_token_before_and_split_by_task(tasks, tokenizer):
    examples = [tasks[name].examples("train", 1, seed=0)[0] for name in ("math", "code", "math")]
    batch = pack(examples, tokenizer, 40, ["math", "code", "math"])
    position, target, which = batch.targets()
    torch.testing.assert_close(batch.ids.flatten()[position + 1], target)
    assert bool(batch.answer.flatten()[position + 1].all()) and len(position) == int(batch.answer.sum())
    assert sorted(which) == ["code", "math"]
    assert set((position[which["code"]] // 40).tolist()) == {1}
    assert set((position[which["math"]] // 40).tolist()) == {0, 2}


def test_step_n_of_a_mixture_is_the_same_in_every_run(tasks, tokenizer):
    rows = {"math": 2, "text": 1}
    one, two = (Mixture(tasks, rows, tokenizer, 48, seed=3) for _ in range(2))
    later = [one.batch(step) for step in range(4)][3]
    again = two.batch(3)
    torch.testing.assert_close(later.ids, again.ids)
    torch.testing.assert_close(later.answer, again.answer)
    assert later.task == ("math", "math", "text")
    assert one.tokens_per_step == 3 * 48


def test_steps_and_seeds_of_a_mixture_differ(tasks, tokenizer):
    def ids(seed, step):
        return Mixture(tasks, {"math": 3}, tokenizer, 48, seed).batch(step).ids

    rows = {tuple(row) for step in range(5) for row in ids(0, step).tolist()}
    assert len(rows) == 15
    assert not torch.equal(ids(0, 1), ids(1, 1))


def test_a_mixture_of_unknown_tasks_is_refused(tasks, tokenizer):
    with pytest.raises(ValueError, match=r"knowledge, math.*got maths"):
        Mixture(tasks, {"maths": 1}, tokenizer, 48, seed=0)


def test_a_task_whose_answers_are_all_cut_off_is_named(tasks, tokenizer):
    batch = pack(tasks["retrieval"].examples("train", 2, seed=0), tokenizer, 3, ["retrieval"] * 2)
    with pytest.raises(ValueError, match=r"within a row of seq_len = 3 tokens, retrieval has none .*raise seq_len"):
        batch.targets()
