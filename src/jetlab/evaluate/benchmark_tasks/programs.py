"""Filters of the tasks in this folder: what a model answered -> programs to run, one list for each document.

A filter gets `resps`, the answers to each document, and `docs`, the documents in the same order.
"""

import ast


def completions(resps: list[list[str]], docs: list[dict]) -> list[list[str]]:
    """Answers that go on where the document's `prompt` ends."""
    return [[doc["prompt"] + text for text in texts] for texts, doc in zip(resps, docs, strict=True)]


def scripts(resps: list[list[str]], docs: list[dict]) -> list[list[str]]:
    """Answers that are whole programs."""
    return [list(texts) for texts in resps]


def inputs(resps: list[list[str]], docs: list[dict]) -> list[list[str]]:
    """CRUXEval-I: the document's code, and the assertion that f of the predicted input is the given output."""
    return [
        [f"{doc['code']}\nassert f({predicted_input(text)}) == {doc['output']}" for text in texts]
        for texts, doc in zip(resps, docs, strict=True)
    ]


def outputs(resps: list[list[str]], docs: list[dict]) -> list[list[str]]:
    """CRUXEval-O: the document's code, and the assertion that f of the given input is the predicted output."""
    return [
        [f"{doc['code']}\nassert f({doc['input']}) == {predicted_output(text)}" for text in texts]
        for texts, doc in zip(resps, docs, strict=True)
    ]


def predicted_input(answer: str) -> str:
    """The arguments in `… [ANSWER] assert f(arguments) == …`; without an assertion the answer as it stands."""
    text, assertion = _assertion(answer)
    if assertion is None or not isinstance(assertion.left, ast.Call):
        return text
    call = assertion.left
    keywords = [f"{keyword.arg}={ast.unparse(keyword.value)}" for keyword in call.keywords]
    return ", ".join([*map(ast.unparse, call.args), *keywords])


def predicted_output(answer: str) -> str:
    """The right side of `… [ANSWER] assert f(…) == right side`; without an assertion the answer as it stands."""
    text, assertion = _assertion(answer)
    return text if assertion is None else ast.unparse(assertion.comparators[-1])


def _assertion(answer: str) -> tuple[str, ast.Compare | None]:
    """The text between the answer's tags, and the comparison that it asserts, if it does."""
    text = answer.rpartition("[ANSWER]")[2].partition("[/ANSWER]")[0].strip()
    try:
        statement = ast.parse(text).body[0]
    except (SyntaxError, ValueError, IndexError):
        return text or "None", None
    asserted = isinstance(statement, ast.Assert) and isinstance(statement.test, ast.Compare)
    return text, statement.test if asserted else None


def not_run(doc: dict, results: list) -> dict:
    """In place of a metric: programs are run by `jetlab.evaluate.execution`, which `score` puts here."""
    raise RuntimeError("this task runs code: score it by jetlab.evaluate.benchmarks.score with execute_code=True")
