"""Threads of a merge: each takes a tensor of its own, or all of them share the blocks of a large one."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

import torch

from fusion.merging.deltas import Run

Result = TypeVar("Result")
AHEAD = 4


class Workers:
    """A pool for the time of a `with` block, in which torch itself takes one thread per call.

    More would gain nothing, since blocks fit a core's cache, and could change sums in the last bit.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._torch_threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(threads, "merge")

    def __enter__(self) -> "Workers":
        torch.set_num_threads(1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._torch_threads)

    def each(
        self, names: Sequence[str], alone: Callable[[str], bool], work: Callable[[str, Run], Result]
    ) -> Iterator[tuple[str, Result]]:
        """`work(name, run)` of every name; results come in the order of names.

        Where `alone(name)`, nothing else goes on meanwhile, and `run` is shared by all threads.
        """
        waiting: deque[tuple[str, Future[Result]]] = deque()
        for name in names:
            if alone(name):
                yield from _all(waiting)
                yield name, work(name, Run(self._pool, self._threads))
                continue
            waiting.append((name, self._pool.submit(work, name, Run())))
            while len(waiting) > AHEAD * self._threads or waiting[0][1].done():
                yield _next(waiting)
                if not waiting:
                    break
        yield from _all(waiting)


def _next(waiting: deque[tuple[str, "Future[Result]"]]) -> tuple[str, Result]:
    name, future = waiting.popleft()
    return name, future.result()


def _all(waiting: deque[tuple[str, "Future[Result]"]]) -> Iterator[tuple[str, Result]]:
    while waiting:
        yield _next(waiting)
