"""The batched scorer: a context is read once, and each of its questions is answered from the state carried over.

Many architectures of one model are scored in the same forward calls, in which layers that they share compute once.

Scores are means over contexts, and their standard errors are clustered by context: questions about one context share
its difficulty, so they do not count as independent.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from transformers import DynamicCache

from jetlab.config import Tasks
from jetlab.layers.state import n_bytes
from jetlab.models.prefixes import branching
from jetlab.models.surgery import HybridCache, LayerKinds, Slot, decoder, kinds_of, path_bytes
from jetlab.progress import progress
from jetlab.tasks import Example, Task, build_tasks

# Rows of one forward. 37 placements, 32 contexts of the scored tasks on one core of an EPYC: 11.4, 10.4, 10.3, 10.9, 12.5 s
# at 1024, 2048, 4096, 8192, 16384 rows, and at most 0.54, 0.64, 0.82, 1.15, 1.7 GiB. A GPU wants fewer, larger calls.
MAX_ROWS = {"cpu": 2048, "cuda": 16384}


@dataclass(frozen=True)
class Score:
    """One task's score. `correct` and `loss` [n contexts]: means over the questions of each context.

    For "accuracy" `correct` is the share of right answers and `loss` the negative log likelihood of the right answer in
    nats; for "bits_per_char" both are bits per character.
    """

    task: str
    metric: str
    chance: float
    correct: np.ndarray
    loss: np.ndarray
    n_questions: int

    @property
    def value(self) -> float:
        return float(self.correct.mean())

    @property
    def se(self) -> float:
        """Standard error of the mean over contexts."""
        return standard_error(self.correct)

    @property
    def neg_loss(self) -> float:
        return -float(self.loss.mean())


def standard_error(values: np.ndarray) -> float:
    """sd / √n; 0 for a single value, of which no spread is known."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0


@dataclass(frozen=True)
class _Asked:
    """A question in tokens: rows of prompt + tail, one per choice, or one when choices are single tokens."""

    context: int
    prompt: list[int]
    continuations: list[list[int]]  # the right answer first
    n_chars: int

    @property
    def tails(self) -> list[list[int]]:
        """What a row holds behind the prompt: a continuation without its last token, which is only predicted."""
        single = all(len(continuation) == 1 for continuation in self.continuations)
        return [[]] if single else [continuation[:-1] for continuation in self.continuations]


class Exam:
    """The examples of some tasks, tokenised once, to be put to many models.

    `n_questions` questions are asked of each context at most. A context's questions do not see one another.
    """

    def __init__(
        self, tasks: Iterable[Task], tokenizer, split: str, n_contexts: int, seed: int, *, n_questions: int = 12
    ):
        self.split, self.n_contexts = split, n_contexts
        self._papers = []
        for task in tasks:
            examples = task.examples(split, n_contexts, seed)
            self._papers.append((task, *_tokenise(examples, tokenizer, n_questions)))

    @torch.no_grad()
    def score(
        self, model, *, batch_size: int = 32, max_rows: int | None = None, label: str = "exam"
    ) -> dict[str, Score]:
        """The score of every task; arguments as those of `score_all`.

        The model has slots, whose active paths are scored, or is one of Transformers' own with `model` and `lm_head` whose
        states a DynamicCache holds: a Qwen2, a NemotronH.
        """
        if _has_slots(model):
            active = kinds_of(model)
            return self.score_all(model, [active], batch_size=batch_size, max_rows=max_rows, label=label)[active]
        max_rows = max_rows or _fitting_rows(model, self._longest)
        scores = {}
        n_read = len(self._papers) * self.n_contexts
        with _evaluating(model), progress(n_read, label, unit="context") as bar:
            for task, contexts, asked in self._papers:
                fitting = max(1, max_rows // _rows_of_a_context(asked))
                (scores[task.name],) = _score(model, task, contexts, asked, min(batch_size, fitting), bar)
        return scores

    @torch.no_grad()
    def score_all(
        self,
        model,
        architectures: Iterable[LayerKinds],
        *,
        batch_size: int = 32,
        max_rows: int | None = None,
        label: str = "exam",
    ) -> dict[LayerKinds, dict[str, Score]]:
        """The score of every task under each architecture that the model has paths for -> {architecture: {task: Score}}.

        A forward holds at most `batch_size` contexts and `max_rows` rows, questions times architectures (None: what suits
        the model's device). Where these are
        too many, it holds fewer contexts; where those of one context are, fewer architectures, which are neighbours in
        sorted order, so that they still share most layers; at least one of each. `label` names the line of progress.
        """
        wanted = list(dict.fromkeys(map(tuple, architectures)))
        max_rows = max_rows or _fitting_rows(model, self._longest)
        n_rows = max(_rows_of_a_context(asked) for _, _, asked in self._papers)
        groups = _split(sorted(wanted), max(1, max_rows // n_rows))
        scores: dict[LayerKinds, dict[str, Score]] = {kinds: {} for kinds in wanted}
        n_read = len(groups) * len(self._papers) * self.n_contexts
        with _evaluating(model), progress(n_read, label, unit="context") as bar:
            for group in groups:
                with branching(model, group) as order:
                    for task, contexts, asked in self._papers:
                        fitting = max(1, max_rows // (len(order) * _rows_of_a_context(asked)))
                        found = _score(model, task, contexts, asked, min(batch_size, fitting), bar)
                        for kinds, score in zip(order, found, strict=True):
                            scores[kinds][task.name] = score
        return scores

    def n_tokens(self) -> dict[str, int]:
        """Tokens that one score reads, by task: each context once, each question with its right answer."""
        return {
            task.name: sum(map(len, contexts)) + sum(len(q.prompt) + len(q.continuations[0]) for q in asked)
            for task, contexts, asked in self._papers
        }

    @property
    def _longest(self) -> int:
        """Tokens of the longest context."""
        return max(len(context) for _, contexts, _ in self._papers for context in contexts)


def exam(tasks: Tasks, tokenizer, split: str, seed: int, names: Iterable[str] | None = None) -> Exam:
    """The exam that section `tasks` of params.yaml describes, over all tasks or those in `names`."""
    built = build_tasks(tasks.sizes)
    chosen = [built[name] for name in (built if names is None else names)]
    return Exam(chosen, tokenizer, split, tasks.n_contexts[split], seed, n_questions=tasks.n_questions)


def _tokenise(examples: Sequence[Example], tokenizer, n_questions: int) -> tuple[list[list[int]], list[_Asked]]:
    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids if text else []

    contexts = [encode(example.context) for example in examples]
    asked = []
    for index, example in enumerate(examples):
        for question in example.questions[:n_questions]:
            others = [choice for choice in question.choices if choice != question.answer]
            prompt = encode(question.prompt)
            # as lm-eval does it: the tokens of the whole less those of the prompt, for tokenisers that merge at the border
            whole = [encode(question.prompt + text)[len(prompt) :] for text in (question.answer, *others)]
            asked.append(_Asked(index, prompt, whole, len(question.answer)))
    return contexts, asked


def _has_slots(model) -> bool:
    return all(isinstance(getattr(layer, "self_attn", None), Slot) for layer in decoder(model).layers)


@contextmanager
def _evaluating(model) -> Iterator[None]:
    """Within it the model is in evaluation mode."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class _TransformersCache(DynamicCache):
    """The states of a model without slots. Rows can be selected, and tokens are counted if no layer attends.

    A DynamicCache selects rows of keys and values alone, and reads the number of tokens off a layer that keeps keys.
    `n_seen`, the tokens of the calls so far, is for the caller to set.
    """

    def __init__(self, model):
        super().__init__(config=model.config)
        self.attends = not all(linear or dummy for linear, dummy in zip(self.is_linear, self.is_dummy, strict=True))
        self.n_seen = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return super().get_seq_length(layer_idx) if self.attends else self.n_seen

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        if self.attends:
            return super().get_mask_sizes(query_length, layer_idx)
        return self.n_seen + query_length, 0

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.reorder_cache(indices)  # of any number, in all kinds of layers

    def nbytes(self) -> int:
        """Bytes that the states occupy now."""
        named = ("keys", "values", "conv_states", "recurrent_states")
        held = [vars(layer).get(name) for layer in self.layers for name in named]
        return n_bytes([list(state.values()) if isinstance(state, dict) else state for state in held])


def _fitting_rows(model, n_tokens: int) -> int:
    """Rows of one forward: `MAX_ROWS`, or on a GPU what half of its free memory holds of states and logits if that is less."""
    device = next(model.parameters()).device
    if device.type == "cpu":
        return MAX_ROWS["cpu"]
    if _has_slots(model):
        state = sum(max(of.values()) for of in path_bytes(model, n_tokens, model.dtype))
    else:
        cache, ids = _TransformersCache(model), torch.zeros(1, n_tokens, dtype=torch.long, device=device)
        model.model(input_ids=ids, past_key_values=cache, use_cache=True)
        state = cache.nbytes()
    logits = 4 * 4 * model.config.get_text_config().vocab_size  # of one token, in fp32, with its softmax
    return max(1, min(MAX_ROWS["cuda"], torch.cuda.mem_get_info(device)[0] // 2 // (state + logits)))


def _rows_of_a_context(asked: Sequence[_Asked]) -> int:
    """Rows that the questions of one context fill, at most."""
    rows = Counter()
    for question in asked:
        rows[question.context] += len(question.tails)
    return max(rows.values())


def _split(items: Sequence, size: int) -> list[Sequence]:
    return [items[at : at + size] for at in range(0, len(items), size)]


def _score(
    model, task: Task, contexts: list[list[int]], asked: list[_Asked], batch_size: int, bar: progress
) -> list[Score]:
    """The score under each architecture of the batch, in its order."""
    correct, loss = defaultdict(list), defaultdict(list)
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, context in enumerate(contexts):
        by_length[len(context)].append(index)  # equal lengths only: then no padding stands between context and question
    questions = defaultdict(list)
    for question in asked:
        questions[question.context].append(question)
    for group in (group for indices in by_length.values() for group in _split(indices, batch_size)):
        for question, right, nll in _ask(model, [contexts[i] for i in group], [questions[i] for i in group]):
            scale = 1 / (question.n_chars * math.log(2)) if task.metric == "bits_per_char" else 1.0
            loss[question.context].append(nll * scale)
            correct[question.context].append(nll * scale if task.metric == "bits_per_char" else right)
        bar.update(len(group))
    order = range(len(contexts))
    by_architecture = [np.stack([np.mean(values[i], axis=0) for i in order], axis=1) for values in (correct, loss)]
    return [
        Score(task.name, task.metric, task.chance, ok, nll, len(asked))
        for ok, nll in zip(*by_architecture, strict=True)
    ]


def _ask(
    model, contexts: list[list[int]], questions: list[list[_Asked]]
) -> Iterator[tuple[_Asked, np.ndarray, np.ndarray]]:
    """Yield (question, right?, negative log likelihood of the right answer) for contexts of one length.

    The arrays [P] have a value for each architecture of the batch, one without `branching`.
    """
    device, has_slots = next(model.parameters()).device, _has_slots(model)
    cache = HybridCache() if has_slots else _TransformersCache(model)
    prefix = torch.tensor(contexts, device=device)
    if prefix.shape[1] > 1:  # the last token goes with the question
        model.model(input_ids=prefix[:, :-1], past_key_values=cache, use_cache=True)
        cache.n_seen = prefix.shape[1] - 1
    rows, owner = [], []
    places: dict[tuple[int, int], int] = {}  # (row, column) where a token is predicted, in order
    place, target = [], []  # of every token of every continuation
    for index, question in ((index, question) for index, asked in enumerate(questions) for question in asked):
        tails, first, start = question.tails, len(rows), len(question.prompt)
        rows += [[contexts[index][-1], *question.prompt, *tail] for tail in tails]
        owner += [index] * len(tails)
        for number, continuation in enumerate(question.continuations):
            row = first if len(tails) == 1 else first + number
            place += [places.setdefault((row, start + i), len(places)) for i in range(len(continuation))]
            target += continuation
    width = max(map(len, rows))
    if not has_slots:
        width = max(width, 2)  # a lone token goes by Mamba2's step form, which lets dt pass below time_step_min
    ids = torch.tensor(
        [row + [0] * (width - len(row)) for row in rows], device=device
    )  # causal: what follows is not seen
    cache.batch_select_indices(torch.tensor(owner, device=device))
    hidden = model.model(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state
    row, column = map(list, zip(*places, strict=True))
    hidden = hidden.unflatten(0, (len(rows), -1))[row, :, column]  # [places, P, D]
    log_p = model.lm_head(hidden).float().log_softmax(-1)
    place, target = torch.tensor(place, device=device), torch.tensor(target, device=device)
    token_log_p = log_p[place, :, target].double().cpu().numpy()  # [tokens, P]
    greedy = (log_p.argmax(-1)[place] == target[:, None]).cpu().numpy()
    at = 0
    for question in (question for asked in questions for question in asked):
        ends = np.cumsum([at, *map(len, question.continuations)])
        log_ps = [token_log_p[i:j].sum(0) for i, j in pairwise(ends)]
        right = log_ps[0] > np.max(log_ps[1:], axis=0) if len(log_ps) > 1 else greedy[at : ends[1]].all(0)
        yield question, right.astype(float), -log_ps[0]
        at = ends[-1]


def normalised(score: Score, ceiling: float) -> float:
    """(score − chance) / (ceiling − chance): 0 is guessing, 1 is the teacher."""
    return (score.value - score.chance) / max(ceiling - score.chance, 1e-9)


def paired_difference(a: Score, b: Score) -> tuple[float, float, int]:
    """Mean of a − b over the contexts that both were asked about, its standard error, and the number of contexts."""
    if len(a.correct) != len(b.correct):
        raise ValueError(f"a paired difference needs the same contexts, got {len(a.correct)} and {len(b.correct)}")
    difference = a.correct - b.correct
    return float(difference.mean()), standard_error(difference), len(difference)
