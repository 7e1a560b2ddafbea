"""The study's tasks inside lm-eval: the same examples, asked and judged by the field's harness instead of our scorer.

lm-eval reads context, prompt and answer of each question as one text and carries nothing over, so that agreement with
`jetlab.evaluate.suite` checks both the carried state and the judging. Nothing is downloaded and no file is written.
"""

import logging
import math
from collections.abc import Sequence
from contextlib import contextmanager

import numpy as np
from lm_eval import evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.task import Task as HarnessTask
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel

from jetlab.config import Tasks
from jetlab.evaluate.suite import standard_error
from jetlab.tasks import SCORED, Question, Task, build_tasks


class _Task(HarnessTask):
    """One task of the study; a document is (number of the context, its text, one question about it)."""

    VERSION = 1

    def __init__(self, task: Task, n_contexts: int, seed: int, n_questions: int):
        super().__init__()
        self._task = task
        self._documents = [
            (index, example.context, question)
            for index, example in enumerate(task.examples("test", n_contexts, seed))
            for question in example.questions[:n_questions]
        ]
        self._config.task, self._config.num_fewshot = task.name, 0

    def download(self, *_args, **_kwargs) -> None:
        """Nothing: the examples are made here."""

    def has_training_docs(self) -> bool:
        return False

    def has_validation_docs(self) -> bool:
        return False

    def has_test_docs(self) -> bool:
        return True

    def test_docs(self) -> list[tuple[int, str, Question]]:
        return self._documents

    def doc_to_text(self, doc) -> str:
        return doc[1] + doc[2].prompt

    def doc_to_target(self, doc) -> str:
        return doc[2].answer

    def build_all_requests(self, **_options) -> None:
        """The requests of all documents, without the base class's progress bar and few-shot sampling."""
        self._instances = [
            request for index, doc in enumerate(self._documents) for request in self.construct_requests(doc, index)
        ]

    def construct_requests(self, doc, index: int, **_kwargs) -> list[Instance]:
        """One log likelihood per choice, or one of the right answer. One-token choices share a forward pass."""
        metadata = (self._task.name, index, 1)
        asked = doc[2].choices or (doc[2].answer,)
        return [
            Instance("loglikelihood", {}, (self.doc_to_text(doc), text), i, metadata) for i, text in enumerate(asked)
        ]

    def process_results(self, doc, results) -> dict[str, tuple[int, float]]:
        """(number of the context, score of the question), for both aggregations."""
        index, _, question = doc
        if self._task.metric == "bits_per_char":
            score = -results[0][0] / (len(question.answer) * math.log(2))
        elif question.choices:
            likeliest = int(np.argmax([log_p for log_p, _ in results]))
            score = float(question.choices[likeliest] == question.answer)
        else:
            score = float(results[0][1])  # every token of the answer is the likeliest one
        return {"value": (index, score), "se": (index, score)}

    def aggregation(self) -> dict:
        return {
            "value": lambda items: float(_by_context(items).mean()),
            "se": lambda items: standard_error(_by_context(items)),
        }

    def higher_is_better(self) -> dict[str, bool]:
        return {"value": self._task.metric != "bits_per_char", "se": False}


class _Model(HFLM):
    """HFLM without a progress bar."""

    def loglikelihood(self, requests, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)


def _by_context(items: Sequence[tuple[int, float]]) -> np.ndarray:
    """Mean over the questions of each context."""
    scores: dict[int, list[float]] = {}
    for index, score in items:
        scores.setdefault(index, []).append(score)
    return np.array([np.mean(scores[index]) for index in sorted(scores)])


@contextmanager
def _plain_forward(model: PreTrainedModel):
    """Within it the model keeps no cache (lm-eval reads none, and slots take only their own kind) and lm-eval is silent."""
    use_cache, was_training = model.config.use_cache, model.training
    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm_eval.evaluator", "lm_eval.models.huggingface")]
    levels = [logger.level for logger in loggers]
    model.config.use_cache = False
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        model.config.use_cache = use_cache
        model.train(was_training)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def score_with_lm_eval(
    model: PreTrainedModel,
    tokenizer,
    tasks_cfg: Tasks,
    n_contexts: int,
    seed: int,
    *,
    names: Sequence[str] = SCORED,
    batch_size: int = 32,
) -> dict[str, dict[str, float | np.ndarray]]:
    """task -> {value, se, n, contexts}: what lm-eval says of the first `n_contexts` test examples; `n` counts contexts.

    `contexts` [n] is the mean over the questions of each, as `Score.correct` has them, so that two scorers can be compared
    to the last example.

    Choices are right when the likeliest one is the answer, free answers when they are what greedy decoding gives (lm-eval's
    `is_greedy`); text is in bits per character. `se` is clustered by context, as in `jetlab.evaluate.suite`.
    `model` is a Hugging Face model, with slots or without. Raises ValueError for a name that is no task.
    """
    tasks = build_tasks(tasks_cfg.sizes)
    unknown = sorted(set(names) - set(tasks))
    if unknown or not names:
        raise ValueError(f"names must be tasks among {', '.join(tasks)}, got {', '.join(unknown) or 'none'}")
    with _plain_forward(model):
        # `evaluate`, not `simple_evaluate`: that one first reads lm-eval's own 10,000 task files and lists the machine's
        # packages (20 s), and seeds the global generators.
        found = evaluate(
            lm=_Model(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            task_dict={name: _Task(tasks[name], n_contexts, seed, tasks_cfg.n_questions) for name in names},
            bootstrap_iters=0,
            log_samples=True,
        )
    scores = {}
    for name in names:
        whole = found["results"][name]
        contexts = _by_context([sample["value"] for sample in found["samples"][name]])
        scores[name] = {"value": whole["value,none"], "se": whole["se,none"], "n": n_contexts, "contexts": contexts}
    return scores
