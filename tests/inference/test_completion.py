"""Completion gives what a plain loop and Transformers' own stop strings give, and scores as GSM8K is scored."""

import functools
import math
from decimal import Decimal

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from jetlab.hf import JetNemotronConfig, JetNemotronForCausalLM
from jetlab.inference.completion import (
    GSM8K,
    StopStrings,
    answer_requests,
    complete,
    exact_match,
    few_shot,
    final_number,
)
from jetlab.inference.engine import Engine, Sampling
from jetlab.models import surgery

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
N_NEW = 24
PROMPTS = ["abc|", "3 + 4 is 7 and so on|", "ab\n\ncd 12|", "x|", "fed cba fed|"]
# One token holds them, a token's end and the next one's beginning, the middle of a token, several tokens.
STOPS = [["a"], ["\n\n"], ["bc"], ["7 "], ["e\nd"], ["||||"], ["c", "ab"], ["0a", "ef", "5\n"], ["\n", "fe"]]


@pytest.fixture(scope="module")
def letters():
    """A tokeniser of single letters and of whole words and line ends of several, as BPE ones have."""
    singles = [*"abcdefx+.|0123456789is", "Ġ", "Ċ"]
    several = ["ab", "bc", "cd", "de", "ef", "Ġa", "Ġfed", "abc", "ĊĊ", "cĊ", "eĊd", "7Ġ", "12", "ĠisĠ", "aĠb", "0ab"]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(["<pad>", "<end>", *singles, *several]))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<pad>", "<end>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<end>", clean_up_tokenization_spaces=False
    )


@pytest.fixture(scope="module")
def made(letters):
    """`made(name)`: a model and its tokeniser; random ones write whatever their tokeniser has."""

    def build(name):
        if name == "teacher":
            model, tokenizer = surgery.load("assets/teacher/0")
            return model.to(DEVICE), tokenizer
        shape = {"vocab_size": len(letters), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
        shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 1}
        blocks = {"sliding_attention": {"window_size": 5}}
        blocks["jetblock"] = {"num_heads": 2, "head_dim": 8, "expand_v": 2.0, "norm_eps": 1e-5, "conv_size": 4}
        kinds = ["jetblock", "attention", "sliding_attention"]
        torch.manual_seed(3)
        if name == "qwen2":
            model = Qwen2ForCausalLM(Qwen2Config(**shape))
        else:
            config = JetNemotronConfig(**shape, layer_kinds=kinds, efficient_attention_config=blocks)
            model = JetNemotronForCausalLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.35)
        return model.to(DEVICE).eval(), letters

    return functools.cache(build)


def before_stop(text, stop):
    return text[: min((text.find(s) for s in stop if s in text), default=len(text))]


@torch.no_grad()
def plainly(model, tokenizer, prompt, stop):
    """One text: a whole pass per token, the whole answer decoded each time."""
    ids = tokenizer(prompt).input_ids
    new = []
    while len(new) < N_NEW and tokenizer.eos_token_id not in new:
        new.append(int(model(torch.tensor([ids + new], device=DEVICE), use_cache=False).logits[0, -1].argmax()))
        text = tokenizer.decode(new, skip_special_tokens=True)
        if any(s in text for s in stop):
            break
    return before_stop(tokenizer.decode(new, skip_special_tokens=True), stop)


def theirs(model, tokenizer, prompts, stop):
    """Transformers' generate with `stop_strings`, on one batch padded on the left."""
    rows = tokenizer(prompts).input_ids
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=DEVICE)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=DEVICE)
    new = model.generate(
        ids, attention_mask=mask, max_new_tokens=N_NEW, do_sample=False, pad_token_id=0,
        eos_token_id=tokenizer.eos_token_id, stop_strings=stop, tokenizer=tokenizer,
    )[:, longest:]  # fmt: skip
    return [before_stop(text, stop) for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


@pytest.mark.parametrize("stop", STOPS, ids=repr)
@pytest.mark.parametrize("name", ["qwen2", "jet"])
def test_answers_are_those_of_a_plain_loop_and_of_transformers(name, stop, made):
    model, tokenizer = made(name)
    expected = [plainly(model, tokenizer, prompt, stop) for prompt in PROMPTS]
    assert theirs(model, tokenizer, PROMPTS, stop) == expected
    for batch_size in (1, 2, 5, 8):
        engine = Engine(model, batch_size=batch_size, max_len=60)
        assert complete(engine, PROMPTS, N_NEW, tokenizer, stop=stop) == expected


def test_the_stop_strings_above_do_cut_answers(made):
    """Each of them ends some answer of a model early, or the comparison would compare nothing."""
    whole = [text for name in ("qwen2", "jet") for text in theirs(*made(name), PROMPTS, ["||||"])]
    assert [stop for stop in STOPS if not any(s in text for text in whole for s in stop)] == [["||||"]]


def test_the_bundled_teacher_stops_where_transformers_stops(made):
    model, tokenizer = made("teacher")
    prompts = ["<math> amber 3 bronze 4 amber", "<retrieval> copper fox", "<code> x = 4"]
    engine = Engine(model, batch_size=2, max_len=100)
    whole = complete(engine, prompts, N_NEW, tokenizer)
    assert all(whole) and whole == theirs(model, tokenizer, prompts, ["not there"])
    for stop in ([whole[0][3:7]], [whole[1][-5:-2], whole[2][1:4]], [whole[2][:1]]):
        expected = theirs(model, tokenizer, prompts, stop)
        assert expected != whole
        assert complete(engine, prompts, N_NEW, tokenizer, stop=stop) == expected
        assert [plainly(model, tokenizer, prompt, stop) for prompt in prompts] == expected


def test_the_loop_stops_with_the_last_row_and_no_row_reads_on(made, monkeypatch):
    model, tokenizer = made("qwen2")
    engine = Engine(model, batch_size=5, max_len=60)
    steps = []
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda: steps.append(1) or step())
    asked = []
    strings = StopStrings(["a"], tokenizer)
    answers = engine.generate(
        tokenizer(PROMPTS).input_ids, N_NEW, ended=lambda new: asked.append(len(new)) or strings(new)
    )
    assert len(steps) == max(map(len, answers)) - 1 < N_NEW - 1
    assert asked == sorted(asked, reverse=True) and asked[0] == 5 > asked[-1]
    texts = tokenizer.batch_decode(answers)
    assert all("a" in text and "a" not in tokenizer.decode(row[:-1]) for text, row in zip(texts, answers, strict=True))


def test_a_stop_string_does_not_begin_in_the_prompt(made):
    model, tokenizer = made("qwen2")
    engine = Engine(model, batch_size=1, max_len=60)
    first = complete(engine, [PROMPTS[0]], 1, tokenizer)[0]
    assert complete(engine, [PROMPTS[0]], 3, tokenizer, stop=["|" + first[0]]) == complete(
        engine, [PROMPTS[0]], 3, tokenizer
    )


def test_a_stop_string_that_is_a_special_token_ends_an_answer(made):
    model, tokenizer = made("qwen2")
    engine = Engine(model, batch_size=5, max_len=60)
    told = []
    generate = engine.generate
    engine.generate = lambda *args, **options: told.append(options) or generate(*args, **options)
    complete(engine, PROMPTS, 3, tokenizer, stop=["<pad>", "a"])
    complete(engine, PROMPTS, 3, tokenizer, stop=["<end>"])
    assert [sorted(options["eos_token_id"]) for options in told] == [[0, 1], [1]]
    assert told[0]["ended"].stop == ("a",) and told[1]["ended"] is None


def test_only_the_tail_of_an_answer_is_decoded_until_something_is_found(letters):
    decoded = []

    class Counting:
        def batch_decode(self, rows, **options):
            decoded.extend(map(len, rows))
            return letters.batch_decode(rows, **options)

        def decode(self, row, **options):
            decoded.append(len(row))
            return letters.decode(row, **options)

    new = torch.tensor([letters("d" * 40).input_ids, letters("d" * 38 + "bc").input_ids])
    assert StopStrings(["bc", "xxx"], Counting())(new) == [False, True]
    assert decoded == [4, 4, 40]


def test_a_text_is_cut_where_the_first_of_its_stop_strings_begins(letters):
    strings = StopStrings(["bc", "d", "ef"], letters)
    assert [strings.cut(text) for text in ("a d bc", "bcd", "a ef", "abe")] == ["a ", "", "a ", "abe"]


def test_a_string_of_several_bytes_a_letter_is_found(tokenizer):
    new = tokenizer("so ist es schön").input_ids
    strings = StopStrings(["schön"], tokenizer)
    found = [strings(torch.tensor([new[:n]])) for n in range(1, len(new) + 1)]
    assert found.index([True]) == len(tokenizer("so ist es schö").input_ids)
    assert strings.cut("so ist es schön und gut") == "so ist es "


def test_sampled_answers_repeat_with_their_generator(made):
    model, tokenizer = made("jet")
    engine = Engine(model, batch_size=5, max_len=60)
    runs = [
        complete(
            engine, PROMPTS, N_NEW, tokenizer, stop=["a"], sampling=Sampling(),
            generator=torch.Generator(DEVICE).manual_seed(seed),
        )
        for seed in (1, 1, 2)
    ]  # fmt: skip
    assert runs[0] == runs[1] != runs[2]
    assert not any("a" in text for text in runs[0])


@pytest.mark.parametrize("stop", ["abc", [""], ["a", ""]])
def test_stop_strings_without_a_character_are_refused(stop, made):
    model, tokenizer = made("qwen2")
    with pytest.raises(ValueError, match="list of strings with a character each, got"):
        complete(Engine(model, batch_size=1, max_len=40), ["a"], 2, tokenizer, stop=stop)


def test_requests_of_the_harness_are_answered_in_their_order_each_with_its_own_end(made):
    model, tokenizer = made("qwen2")
    engine = Engine(model, batch_size=2, max_len=60)
    asked = [["a"], ["bc"], ["a"], "bc", None]
    requests = [(p, {"until": until, "max_gen_toks": N_NEW}) for p, until in zip(PROMPTS, asked, strict=True)]
    expected = [
        plainly(model, tokenizer, prompt, [until] if isinstance(until, str) else until or [])
        for prompt, until in zip(PROMPTS, asked, strict=True)
    ]
    assert answer_requests(engine, requests, tokenizer) == expected
    with pytest.raises(ValueError, match="requests must be greedy, got"):
        answer_requests(engine, [("a", {"do_sample": True})], tokenizer)


EXAMPLES = [("How many are {two} and 2?", "2 + 2 = <<2+2=4>>4\n#### 4"), ("And 3?", "It is {answer}.\n#### 7")]


def test_few_shot_prompts_share_their_beginning_and_end_before_the_answer():
    prompts = [few_shot(EXAMPLES, question) for question in ("What is 5?", "What is {answer}?")]
    shared = (
        "Question: How many are {two} and 2?\nAnswer: 2 + 2 = <<2+2=4>>4\n#### 4\n\n"
        "Question: And 3?\nAnswer: It is {answer}.\n#### 7\n\nQuestion: What is "
    )
    assert prompts == [shared + "5?\nAnswer:", shared + "{answer}?\nAnswer:"]
    assert few_shot([], "Why?", "Q: {question} A: {answer}!") == "Q: Why? A:"
    assert few_shot([("a", "b")], "c", "{question}>{answer};", separator=" ") == "a>b; c>"


@pytest.mark.parametrize("template", ["{answer} {question}", "{question}", "{question}{answer}{answer}", ""])
def test_a_template_that_asks_nothing_is_refused(template):
    with pytest.raises(ValueError, match=r"\{question\} and then \{answer\}, once each, got"):
        few_shot(EXAMPLES, "Why?", template)


def test_a_shared_beginning_is_answered_for_all_questions_at_once(made):
    model, tokenizer = made("jet")
    prompts = [few_shot([("ab", "12")], q, "{question}|{answer}", separator="\n\n") for q in ("a", "fed cba", "x x")]
    assert len({prompt.rsplit("\n\n", 1)[0] for prompt in prompts}) == 1
    found = complete(Engine(model, batch_size=3, max_len=60), prompts, N_NEW, tokenizer, stop=["\n"])
    assert found == [plainly(model, tokenizer, prompt, ["\n"]) for prompt in prompts]
    assert GSM8K.endswith("{answer}")


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("She has 3 + 4 = 7.\n#### 7", "7", "7"),
        ("#### 1,234,567.50", "1234567.50", "1234567.50"),
        ("#### $18", "18", "18"),
        ("#### -$5 and then 9", "-5", "9"),
        ("####$-5.", "-5", "-5"),
        ("#### 12\n\nQuestion: 5?\n#### 99", "12", "99"),
        ("It costs $1,200 in all.", None, "1200"),
        ("from 5-3", None, "3"),
        ("it fell to -3", None, "-3"),
        ("it fell to −3", None, "-3"),
        ("about .5 of it", None, "0.5"),
        ("3, 4 and 5,6", None, "6"),
        ("item A7 of B12", None, None),
        ("#### none", None, None),
        ("", None, None),
        ("15% of 80 is 12.00", None, "12"),
    ],
)
def test_the_number_that_an_answer_comes_to(text, strict, flexible):
    assert final_number(text) == (None if strict is None else Decimal(strict))
    assert final_number(text, strict=False) == (None if flexible is None else Decimal(flexible))


def test_exact_match_and_its_standard_error():
    answers = ["so #### 18", "so 18", "#### 18.0", "nothing"]
    references = ["work\n#### 18", "18", "$18", "#### 3"]
    strict, flexible = exact_match(answers, references), exact_match(answers, references, strict=False)
    assert (strict.mean, strict.n, flexible.mean) == (0.5, 4, 0.75)
    assert strict.stderr == pytest.approx(torch.tensor([1.0, 0.0, 1.0, 0.0]).std().item() / math.sqrt(4))
    assert exact_match(["1"], ["1"], strict=False).stderr == 0.0


@pytest.mark.parametrize(
    ("answers", "references", "message"),
    [([], [], "got 0 and 0"), (["1"], ["1", "2"], "got 1 and 2"), (["1"], ["one"], "must hold a number, got 'one'")],
)
def test_texts_that_cannot_be_scored_are_refused(answers, references, message):
    with pytest.raises(ValueError, match=message):
        exact_match(answers, references)
