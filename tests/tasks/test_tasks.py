"""Specification of the tasks: right answers, disjoint splits, examples that depend on nothing but what is asked for."""

import re
from itertools import combinations

import pytest

from jetlab.data import words
from jetlab.tasks import CONTROLS, SCORED, SPLITS, TASKS, build_tasks, split_of

every_task = pytest.mark.parametrize("name", TASKS)


def pairs(context):
    """`<tag> a b c d` -> {a: b, c: d}, in order."""
    found = context.split()[1:]
    return dict(zip(found[::2], found[1::2], strict=True))


def answer_to_knowledge(context, prompt):
    name, relation, last = prompt.split()
    obj = words.facts()[name, relation]
    letter = pairs(context)[obj]
    return f" {letter}" if last == "?" else f" {obj} {letter}"


def answer_to_math(context, prompt):
    _, total, sign, name = prompt.split()
    digit = int(pairs(context)[name])
    return f" {digit} {(int(total) + digit * (1 if sign == '+' else -1)) % 10}"


def answer_to_retrieval(context, prompt):
    return f" {pairs(context)[prompt.strip()]}"


def answer_to_code(context, prompt):
    value = {}
    for target, source, digit in re.findall(r"(\w+) = (?:([a-z]+) )?(\d)", context):
        assert source == "" or value[source] == digit, "a copy shows the value that it took"
        value[target] = digit
    return f" {value[prompt.split()[1]]}"


def answer_to_recency(context, prompt):
    _, after = context.split(" =")
    return f" {pairs(f'<recency>{after}')[prompt.strip()]}"


def answer_to_patterns(context, prompt):
    records = re.findall(r" (\w+) (\w+) (\w+) ([12])", context)
    return next(f" {(first, second)[int(digit) - 1]}" for first, second, name, digit in records if name == prompt[1:])


def answer_to_chain(context, prompt):
    name = prompt.split()[1]
    states = [int(re.search(rf" {name} (\d)", context)[1])]
    for sign, digit in re.findall(rf" {name} ([+-]) (\d)", context):
        states.append((states[-1] + int(sign + digit)) % 10)
    return "".join(f" {state}" for state in states)


def answer_to_facts(_context, prompt):
    name, relation, _ = prompt.split()
    return f" {words.facts()[name, relation]}"


SOLVERS = {
    "knowledge": answer_to_knowledge,
    "math": answer_to_math,
    "retrieval": answer_to_retrieval,
    "code": answer_to_code,
    "recency": answer_to_recency,
    "patterns": answer_to_patterns,
    "chain": answer_to_chain,
    "facts": answer_to_facts,
}


def build_tasks_with(**sizes):
    """The tasks at small sizes, but for those given."""
    small = {
        "knowledge": {"n_options": 4},
        "math": {"n_names": 4},
        "retrieval": {"n_pairs": 4, "key_words": 1},
        "code": {"n_variables": 4, "writes_per_variable": 1.5},
        "recency": {"n_pairs": 4, "n_distractors": 4},
        "patterns": {"n_records": 4},
        "chain": {"n_names": 4, "n_changes": 1},
    }
    return build_tasks(small | sizes)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", SOLVERS)
def test_answers_are_what_an_independent_reader_finds_in_the_text(name, split, tasks):
    for example in tasks[name].examples(split, 20, seed=0):
        for question in example.questions:
            assert question.answer == SOLVERS[name](example.context, question.prompt)


def test_a_sum_in_math_goes_on_from_the_one_before(tasks):
    for example in tasks["math"].examples("train", 5, seed=0):
        totals = [question.prompt.split()[1] for question in example.questions]
        results = [question.answer.split()[1] for question in example.questions]
        assert totals[1:] == results[:-1]


def test_a_counter_shows_its_start_and_every_state(tasks):
    answers = [q.answer for e in tasks["chain"].examples("test", 10, seed=0) for q in e.questions]
    assert all(len(answer.split()) == 3 for answer in answers)


def test_what_no_longer_counts_binds_the_names_that_are_asked_for(tasks):
    """Or the last pair of a name could be told from the others by the name alone."""
    before, after = tasks["recency"].examples("test", 1, seed=0)[0].context.split(" =")
    assert len(before.split()) == 1 + 2 * 7 and len(after.split()) == 2 * 4
    many = [e.context.split(" =") for e in tasks["recency"].examples("test", 40, seed=0)]
    assert sum(bool(set(a.split()[1::2]) & set(b.split()[::2])) for a, b in many) > 5


def test_either_object_of_a_record_is_meant_equally_often(tasks):
    digits = re.findall(r"[12]", "".join(e.context for e in tasks["patterns"].examples("test", 60, seed=0)))
    assert 120 < digits.count("1") < 180  # of 300; sd 8.7


def test_a_key_of_two_words_is_a_name_and_a_relation():
    task = build_tasks_with(retrieval={"n_pairs": 150, "key_words": 2})["retrieval"]
    example = task.examples("test", 1, seed=0)[0]
    keys = re.findall(r" (\w+ (?:likes|fears|hides|feeds)) (\w+)", example.context)
    assert len(dict(keys)) == 150
    assert all(dict(keys)[q.prompt.strip()] == q.answer.strip() for q in example.questions)


def test_text_comes_back_to_the_person_it_began_with(tasks):
    for example in tasks["text"].examples("test", 20, seed=0):
        paragraph = example.questions[0].answer
        people = set(re.findall(r"Anna|Boris|Clara|David|Elena|Felix|Greta|Henry", paragraph))
        assert len(people) == 1 and paragraph.count(". ") == 2 and paragraph.endswith(".")


@every_task
def test_no_context_is_in_two_splits_whatever_the_seeds(name, tasks):
    task = tasks[name]
    found = {
        split: {task.split_key(example) for seed in (0, 1, 7) for example in task.examples(split, 60, seed)}
        for split in SPLITS
    }
    for a, b in combinations(SPLITS, 2):
        assert not found[a] & found[b]
    assert all(split_of(key) == split for split, keys in found.items() for key in keys)


@every_task
def test_an_example_depends_on_split_seed_and_number_alone(name, tasks, sizes):
    task = tasks[name]
    examples = task.examples("search", 6, seed=3)
    assert build_tasks(sizes)[name].examples("search", 6, seed=3) == examples
    assert task.examples("search", 2, seed=3, start=4) == examples[4:]
    assert task.examples("search", 6, seed=4) != examples
    assert task.examples("select", 6, seed=3) != examples


@every_task
def test_tokens_decode_to_the_text_they_came_from(name, tasks, tokenizer):
    for example in tasks[name].examples("train", 5, seed=0):
        text = example.context + "".join(q.prompt + q.answer for q in example.questions)
        assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "  two  spaces ",
        "Grüße, 世界 🙂\u200d",
        "a\tb\r\n\x00",
        "amber ambers kettle7 <math",
        "e\u0301 é \ufeff",
    ],
)
def test_any_other_text_survives_the_tokeniser_too(text, tokenizer):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_every_word_of_the_tasks_is_one_token(tokenizer):
    spaced = (*words.NAMES, *words.OBJECTS, *words.RELATIONS, *words.DIGITS, *words.LETTERS, *words.SIGNS)
    lengths = {text: len(tokenizer(text).input_ids) for text in (*words.TAGS, *(f" {word}" for word in spaced))}
    assert set(lengths.values()) == {1}


@pytest.mark.parametrize("name", [*SOLVERS])
def test_task_text_is_words_alone(name, tasks, tokenizer):
    text = tasks[name].examples("test", 1, seed=0)[0].context
    assert len(tokenizer(text).input_ids) == len(text.split())


@pytest.mark.parametrize("name", ["math", "retrieval", "code", "facts"])
def test_chance_is_one_in_the_number_of_answers_that_occur(name, tasks):
    first = {q.answer.split()[0] for e in tasks[name].examples("train", 120, seed=0) for q in e.questions}
    assert tasks[name].chance == pytest.approx(1 / len(first))


def test_knowledge_offers_as_many_choices_as_chance_says(tasks):
    for example in tasks["knowledge"].examples("test", 5, seed=0):
        for question in example.questions:
            assert question.answer in question.choices
            assert len(set(question.choices)) == round(1 / tasks["knowledge"].chance) == 5


def test_the_world_names_every_object_four_times():
    assert len(words.facts()) == 256
    assert {len(subjects) for subjects in words.subjects_of().values()} == {4}
    assert all(words.facts()[s] == obj for obj, subjects in words.subjects_of().items() for s in subjects)


def things(name, example):
    """How many things the context holds."""
    if name == "code":
        return len(set(re.findall(r"(\w+) =", example.context)))
    return len(pairs(example.context))


@pytest.mark.parametrize("name", SCORED)
def test_contexts_grow_with_difficulty_in_training_and_are_full_elsewhere(name, tasks, sizes):
    full = next(value for key, value in sizes[name].items() if key.startswith("n_"))
    easy = {things(name, e) for e in tasks[name].examples("train", 40, seed=0, difficulty=0.0)}
    hard = {things(name, e) for e in tasks[name].examples("train", 80, seed=0, difficulty=1.0)}
    assert easy == {2}
    assert hard == set(range(2, full + 1))
    for split in SPLITS[1:]:
        assert {things(name, e) for e in tasks[name].examples(split, 10, seed=0, difficulty=0.0)} == {full}


def test_only_training_shows_steps(tasks):
    worked = [q for e in tasks["knowledge"].examples("train", 10, seed=0) for q in e.questions if not q.choices]
    asked = [q for e in tasks["knowledge"].examples("test", 10, seed=0) for q in e.questions if not q.choices]
    assert worked and not asked


def test_no_search_may_look_at_a_control():
    assert all(TASKS[name].objective is None for name in CONTROLS)
    assert all(TASKS[name].objective in ("accuracy", "neg_loss") for name in SCORED)


def test_an_unknown_split_is_refused_with_the_known_ones(tasks):
    with pytest.raises(ValueError, match=r"train, search, select, test, got 'valid'"):
        tasks["math"].examples("valid", 1, seed=0)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        pytest.param({"maths": {}}, r"knowledge, math.* got maths", id="unknown-task"),
        pytest.param({"retrieval": {"n_pairs": 65, "key_words": 1}}, r"2 … 64 .* got 65", id="more-pairs-than-names"),
        pytest.param({"retrieval": {"n_pairs": 1, "key_words": 1}}, r"2 … 64 .* got 1", id="a-single-pair"),
        pytest.param(
            {"retrieval": {"n_pairs": 257, "key_words": 2}}, r"2 … 256 .* got 257", id="more-than-two-words-name"
        ),
        pytest.param({"retrieval": {"n_pairs": 4, "key_words": 3}}, r"1 .* or 2 .* got 3", id="keys-of-three-words"),
        pytest.param({"recency": {"n_pairs": 4, "n_distractors": 0}}, r"at least 1, got 0", id="nothing-to-forget"),
        pytest.param({"patterns": {"n_records": 65}}, r"2 … 64 .* got 65", id="more-records-than-names"),
        pytest.param({"chain": {"n_names": 4, "n_changes": 0}}, r"at least 1, got 0", id="no-change"),
        pytest.param({"knowledge": {"n_options": 17}}, r"2 … 16 .* got 17", id="more-options-than-letters"),
        pytest.param({"math": {"n_names": 0}}, r"2 … 64 .* got 0", id="no-names"),
        pytest.param({"math": {"n_nam": 4}}, r"sizes of math must be n_names, got n_nam", id="misspelt"),
        pytest.param({"math": {}}, r"sizes of math must be n_names, got none", id="left-out"),
        pytest.param({"facts": {"n": 4}}, r"sizes of facts must be none, got n", id="size-of-a-control"),
        pytest.param({"math": {"n_names": 4.5}}, r"math.n_names must be a whole number, got 4.5", id="half-a-name"),
        pytest.param({"code": {"n_variables": 4, "writes_per_variable": 0.5}}, r"at least 1, got 0.5", id="unwritten"),
    ],
)
def test_sizes_that_cannot_be_are_refused_with_the_range(sizes, message):
    with pytest.raises(ValueError, match=message):
        build_tasks_with(**sizes)
