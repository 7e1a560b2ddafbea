"""Text from text: prompts of any length through the engine, each answer cut at its own stop string, and GSM8K-style scores.

An answer is over at the first of its tokens after which its text holds a stop string, wherever the string begins or ends
inside a token. The answer's text counts alone: what a prompt ends with is no part of a stop string (so in lm-eval; the
`stop_strings` of Transformers may begin in the prompt).
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from jetlab.inference.engine import Engine, Sampling

GSM8K = "Question: {question}\nAnswer: {answer}"


class StopStrings:
    """Whether answers hold one of `stop` by now, for `Engine.generate(ended=…)`.

    A token has a byte at least, so a string that the last token completes lies within as many tokens as its bytes, and one
    more is decoded because some tokenisers drop a space at the beginning. A find there is looked for in the whole answer.
    """

    def __init__(self, stop: Sequence[str], tokenizer: PreTrainedTokenizerBase):
        if isinstance(stop, str) or not all(stop):
            raise ValueError(f"stop must be a list of strings with a character each, got {stop!r}; put it in brackets")
        self.stop, self.tokenizer = tuple(stop), tokenizer
        self.n_tokens = 1 + max((len(text.encode()) for text in self.stop), default=0)

    def __call__(self, new: Tensor) -> list[bool]:
        """Of new tokens [rows, so far], every token but the last asked about before: which rows are over."""
        tails = self.tokenizer.batch_decode(new[:, -self.n_tokens :].tolist(), skip_special_tokens=True)
        return [
            self.found(tail) and self.found(self.tokenizer.decode(row.tolist(), skip_special_tokens=True))
            for tail, row in zip(tails, new, strict=True)
        ]

    def found(self, text: str) -> bool:
        return any(stop in text for stop in self.stop)

    def cut(self, text: str) -> str:
        """The text before the stop string that begins first."""
        return text[: min((text.find(stop) for stop in self.stop if stop in text), default=len(text))]


def complete(
    engine: Engine,
    texts: Sequence[str],
    max_new_tokens: int,
    tokenizer: PreTrainedTokenizerBase,
    *,
    stop: Sequence[str] = (),
    sampling: Sampling | None = None,
    generator: torch.Generator | None = None,
) -> list[str]:
    """What follows each text: up to a stop string, which is cut off, the tokeniser's end token, or `max_new_tokens`.

    Texts are tokenised as the tokeniser does by itself, special tokens included, and batched; more of them than
    `batch_size` take turns. A stop string that is a special token ("<|im_end|>") ends an answer as an end token does.
    Sampling, and what is raised, as in `Engine.generate`. Raises ValueError for a stop string without a character.
    """
    special = set(tokenizer.all_special_ids)
    ids = {text: tokenizer.convert_tokens_to_ids(text) for text in stop if text in tokenizer.all_special_tokens}
    ends = {id for id in (*ids.values(), tokenizer.eos_token_id) if id in special}
    strings = StopStrings(stop if isinstance(stop, str) else [text for text in stop if text not in ids], tokenizer)
    answers = engine.generate(
        tokenizer(list(texts)).input_ids,
        max_new_tokens,
        eos_token_id=sorted(ends),
        sampling=sampling,
        generator=generator,
        ended=strings if strings.stop else None,
    )
    return [strings.cut(text) for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]


def answer_requests(
    engine: Engine, requests: Sequence[tuple[str, dict]], tokenizer: PreTrainedTokenizerBase, max_new_tokens: int = 256
) -> list[str]:
    """The answers to lm-eval's `generate_until` requests, (context, {"until", "max_gen_toks"}) each, greedily.

    Requests that end alike are batched. Raises ValueError for one that asks for sampling.
    """
    groups: dict[tuple, list[int]] = {}
    for index, (_, asked) in enumerate(requests):
        if asked.get("do_sample") or asked.get("temperature"):
            raise ValueError(f"requests must be greedy, got {asked}; use `complete` with `sampling`")
        until = asked.get("until") or []
        until = (until,) if isinstance(until, str) else tuple(until)
        groups.setdefault((until, asked.get("max_gen_toks", max_new_tokens)), []).append(index)
    answers = [""] * len(requests)
    for (until, n_tokens), members in groups.items():
        found = complete(engine, [requests[index][0] for index in members], n_tokens, tokenizer, stop=until)
        for index, answer in zip(members, found, strict=True):
            answers[index] = answer
    return answers


def few_shot(
    examples: Sequence[tuple[str, str]], question: str, template: str = GSM8K, *, separator: str = "\n\n"
) -> str:
    """A prompt of worked examples, (question, answer) each, and the question; the same beginning for every question.

    `template` holds {question} and, behind it, {answer}; the last one ends where the answer would begin, without the space
    before it, which tokenisers put into the answer's first token.
    Raises ValueError for a template without the two in this order.
    """
    marks = re.findall(r"\{(?:question|answer)\}", template)
    if marks != ["{question}", "{answer}"]:
        raise ValueError(f"template must hold {{question}} and then {{answer}}, once each, got {template!r}; see GSM8K")

    def filled(text: str, question: str, answer: str = "") -> str:
        # In one pass: a question may hold braces of its own.
        return re.sub(r"\{(question|answer)\}", lambda mark: question if mark[1] == "question" else answer, text)

    asked = filled(template[: template.index("{answer}")], question).rstrip(" ")
    return separator.join([*(filled(template, q, a) for q, a in examples), asked])


# A sign, a currency sign, digits with or without commas at thousands, decimals; not the end of a word or of 1.2.3.
_NUMBER = r"(?<!\w)(?<!\d\.)(-?\$?-?)((?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"


def final_number(text: str, *, strict: bool = True) -> Decimal | None:
    """The number that an answer comes to, None if there is none.

    Strict: that behind the first "####", as GSM8K's answers end. Otherwise the last number of the text. "$1,234.50", "-$5"
    and "18." are numbers; 18.0 equals 18. A minus between two numbers is no sign.
    """
    text = text.replace("−", "-")
    found = re.findall(r"####\s*" + _NUMBER, text)[:1] if strict else re.findall(_NUMBER, text)[-1:]
    for sign, digits in found:
        number = Decimal(digits.replace(",", ""))
        return -number if "-" in sign else number
    return None


@dataclass(frozen=True)
class ExactMatch:
    """Share of right answers and its standard error √(p (1 − p) / (n − 1)), 0 for a single answer."""

    mean: float
    stderr: float
    n: int


def exact_match(answers: Sequence[str], references: Sequence[str], *, strict: bool = True) -> ExactMatch:
    """How many answers come to the number of their reference, a number or a worked answer that ends in "#### number".

    An answer without a number is wrong. Raises ValueError for no or unequally many texts, and a reference without a number.
    """
    if len(answers) != len(references) or not answers:
        raise ValueError(
            f"every answer needs a reference, got {len(answers)} and {len(references)}; give at least one each"
        )
    right = 0
    for answer, reference in zip(answers, references, strict=True):
        expected = final_number(reference)
        if expected is None:
            expected = final_number(reference, strict=False)
        if expected is None:
            raise ValueError(f"a reference must hold a number, got {reference!r}; write it as '#### 18' or '18'")
        right += final_number(answer, strict=strict) == expected
    n, p = len(answers), right / len(answers)
    return ExactMatch(p, math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else 0.0, n)
