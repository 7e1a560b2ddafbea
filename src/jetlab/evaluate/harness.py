"""The study's tasks inside lm-eval: the same examples, asked and judged by the field's harness instead of our scorer.

Each task is written as lm-eval wants it, a YAML description and a file of documents, and lm-eval loads, asks and judges it.
It reads context, prompt and answer of each question as one text and carries nothing over, so that agreement with
`jetlab.evaluate.suite` checks both the carried state and the judging. Nothing is downloaded and no file is left behind.
"""

import contextlib
import io
import json
import logging
import math
import tempfile
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

import datasets
import numpy as np
from lm_eval import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel

from jetlab.config import Tasks
from jetlab.evaluate.suite import standard_error
from jetlab.models.surgery import HybridCache, Slot
from jetlab.tasks import SCORED, build_tasks

_CHOICES = """\
output_type: multiple_choice
doc_to_choice: choices
doc_to_target: right
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
_FREE = """\
output_type: loglikelihood
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
_TEXT = """\
output_type: loglikelihood
doc_to_target: answer
process_results: !function jetlab.evaluate.harness.bits_per_char
metric_list: [{metric: bits_per_char, aggregation: mean, higher_is_better: false}]
"""


class HarnessModel(HFLM):
    """HFLM without progress bars, which generates with a model with slots as well.

    `max_length` in tokens bounds prompt and answer together (None: the model's own), `max_new_tokens` the answer where a
    task does not say.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer,
        *,
        batch_size: int,
        max_length: int | None = None,
        max_new_tokens: int = 256,
    ):
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length)
        self._max_new_tokens = max_new_tokens
        self._has_slots = any(isinstance(module, Slot) for module in model.modules())

    @property
    def max_gen_toks(self) -> int:
        return self._max_new_tokens

    def loglikelihood(self, requests, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def generate_until(self, requests, disable_tqdm: bool = True) -> list[str]:
        return super().generate_until(requests, disable_tqdm=disable_tqdm)

    def _model_generate(self, context, max_length: int, stop: list[str], **options):
        if self._has_slots:  # generate() would bring a cache of another kind, which slots refuse
            options["past_key_values"] = HybridCache()
        return super()._model_generate(context, max_length, stop, **options)


@contextmanager
def quietly(model: PreTrainedModel):
    """Within it lm-eval and its libraries print nothing, and the model keeps no cache unless it generates.

    lm-eval reads none for log likelihoods, and slots take only their own kind. Nor does `datasets` report what it reads:
    it would ask a server to count a use even of local files.
    """
    use_cache, was_training, disabled = model.config.use_cache, model.training, logging.root.manager.disable
    bars, counts = datasets.is_progress_bar_enabled(), datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    model.config.use_cache = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # tqdm's bars; errors are raised, not printed
            yield
    finally:
        model.config.use_cache = use_cache
        model.train(was_training)
        logging.disable(disabled)
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counts
        if bars:
            datasets.enable_progress_bars()


def write_tasks(
    folder: Path, tasks_cfg: Tasks, names: Sequence[str], n_contexts: int, seed: int, *, split: str = "test"
) -> None:
    """Each task as `name`.yaml and `name`.jsonl in `folder`, which `lm_eval.tasks.TaskManager(include_path=folder)` reads.

    A document is one question about one of the first `n_contexts` examples of the split: `context`, the example's number,
    `text`, which is given, and the `answer`, or `choices` and which is `right`. lm-eval's command line reads the folder
    too: `lm_eval run --include_path folder --tasks name`. What `datasets` makes of the files goes to `folder`/cache.
    Raises ValueError for a name that is no task.
    """
    tasks = build_tasks(tasks_cfg.sizes)
    unknown = sorted(set(names) - set(tasks))
    if unknown or not names:
        raise ValueError(f"names must be tasks among {', '.join(tasks)}, got {', '.join(unknown) or 'none'}")
    for name in names:
        documents = [
            {"context": number, "text": example.context + question.prompt, "answer": question.answer}
            | (
                {"choices": question.choices, "right": question.choices.index(question.answer)}
                if question.choices
                else {}
            )
            for number, example in enumerate(tasks[name].examples(split, n_contexts, seed))
            for question in example.questions[: tasks_cfg.n_questions]
        ]
        judging = _TEXT if tasks[name].metric == "bits_per_char" else _CHOICES if "choices" in documents[0] else _FREE
        file = (folder / f"{name}.jsonl").resolve()
        file.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
        head = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": str(file.parent / "cache")},
            "test_split": "test",
            "doc_to_text": "text",
            "target_delimiter": "",
            "num_fewshot": 0,
            "metadata": {"version": 1.0},
        }
        lines = "".join(f"{key}: {json.dumps(value)}\n" for key, value in head.items())  # JSON is YAML
        (folder / f"{name}.yaml").write_text(lines + judging, encoding="utf-8")


def bits_per_char(doc: dict, results: list[tuple[float, bool]]) -> dict[str, float]:
    """−log₂ p(answer) / characters: what the description of a text task names as its `process_results`."""
    return {"bits_per_char": -results[0][0] / (len(doc["answer"]) * math.log(2))}


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
    `is_greedy`); text is in bits per character. `se` is clustered by context, as in `jetlab.evaluate.suite`: lm-eval's own
    would count the questions of a context as independent.
    `model` is a Hugging Face model, with slots or without. Raises ValueError for a name that is no task.
    """
    with tempfile.TemporaryDirectory(prefix="jetlab_tasks_") as folder, quietly(model):
        write_tasks(Path(folder), tasks_cfg, names, n_contexts, seed)
        # `evaluate`, not `simple_evaluate`: that one also lists the machine's packages and seeds the global generators.
        found = evaluate(
            lm=HarnessModel(model, tokenizer, batch_size=batch_size),
            task_dict=TaskManager(include_path=folder, include_defaults=False).load(list(names)),
            bootstrap_iters=0,
            log_samples=True,
        )
    scores = {}
    for name in names:
        contexts = _by_context(found["samples"][name])
        scores[name] = {
            "value": float(contexts.mean()),
            "se": standard_error(contexts),
            "n": len(contexts),
            "contexts": contexts,
        }
    return scores


def _by_context(samples: Sequence[dict]) -> np.ndarray:
    """Mean over the questions of each context, from lm-eval's log of one task, which has one metric."""
    scores: dict[int, list[float]] = {}
    for sample in samples:
        scores.setdefault(sample["doc"]["context"], []).append(sample[sample["metrics"][0]])
    return np.array([np.mean(scores[context]) for context in sorted(scores)])
