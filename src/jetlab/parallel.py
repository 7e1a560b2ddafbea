"""The same work for several inputs, in processes of one thread each: at the study's sizes two processes beat two threads."""

import importlib
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from jetlab.run import die_with_parent

In = TypeVar("In")
Out = TypeVar("Out")


def _start(n_threads: int) -> None:
    die_with_parent()
    torch.set_num_threads(n_threads)


def _import(module: str) -> None:
    importlib.import_module(module)


def n_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def devices(device: str) -> list[str]:
    """The devices over which candidates of a search are split: "cuda" is every GPU that this process sees."""
    return [f"cuda:{i}" for i in range(torch.cuda.device_count())] if device == "cuda" else [device]


def dealt(items: Sequence[In], n: int) -> list[Sequence[In]]:
    """`items` dealt like cards to `n` hands: hand i gets items i, i + n, …; hands that would be empty are left out."""
    return [items[i::n] for i in range(min(n, len(items)))]


@contextmanager
def workers(n_workers: int, *, n_threads: int = 1, module: str | None = None) -> Iterator[Callable]:
    """Yields `run(function, inputs)`, which is `[function(x) for x in inputs]` in `n_workers` fresh processes, in order.

    The processes start at once, each with an import of `module`, and serve every call; with one worker it is this process.
    `function` must be importable from a module. The workers die with this process; an exception in one is raised here.
    """
    if n_workers == 1:
        yield lambda function, inputs: [function(x) for x in inputs]
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(n_workers, mp_context=context, initializer=_start, initargs=(n_threads,)) as pool:
        if module is not None:
            for _ in range(n_workers):
                pool.submit(_import, module)
        yield lambda function, inputs: list(pool.map(function, inputs))


def parallel_map(
    function: Callable[[In], Out], inputs: Sequence[In], *, n_workers: int | None = None, n_threads: int = 1
) -> list[Out]:
    """`[function(x) for x in inputs]` in up to `n_workers` fresh processes, in order; in this one for one input or worker.

    By default as many as the cores of this process hold at `n_threads` each, and at least two. Functions and errors as of
    `workers`.
    """
    n = min(n_workers or max(2, n_cores() // n_threads), len(inputs))
    with workers(max(n, 1), n_threads=n_threads) as run:
        return run(function, inputs)
