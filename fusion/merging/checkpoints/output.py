"""The folder in which a merged model is made: pre-sized files, written in place, and a journal of what is finished."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

from torch import Tensor

from fusion.merging.checkpoints.journal import JOURNAL_FILE, Journal
from fusion.merging.checkpoints.layout import Layout
from fusion.merging.checkpoints.working import clear
from fusion.merging.plan import MergePlan
from fusion.merging.statistics import TensorRecord

COMMIT_BYTES = 128 << 20
COMMIT_SECONDS = 5.0


class Output:
    """The merged weights in the files of a layout; a sink for merged blocks.

    Tensors enter the journal in groups, after their bytes were flushed to the disk by a thread of its own: what the
    journal names survives a kill and a power cut.
    """

    def __init__(self, plan: MergePlan, layout: Layout, working: Path, key: str) -> None:
        self.plan, self.working = plan, working
        self._files = layout.at(working)
        self.homes = {name: file for file in self._files for name in file.specs}
        place = {name: i for i, name in enumerate(plan.merged_names)}
        self.in_order = [
            file for file in self._files if _ascends([place[name] for name in file.specs if name in place])
        ]
        """Files that are written from front to back."""
        self._journal = self._resume(working, key) or self._begin(plan, working, key)
        self.resumed: Mapping[str, TensorRecord] = dict(self._journal.records)

    def _resume(self, working: Path, key: str) -> Journal | None:
        """Only weights that are in the journal stay: a kill may have torn any other file, the manifest's too."""
        journal = Journal.resume(working, key)
        if journal:
            clear(working, keep=[JOURNAL_FILE, *(file.path.name for file in self._files)])
        return journal

    def _begin(self, plan: MergePlan, working: Path, key: str) -> Journal:
        clear(working)
        for file in self._files:
            file.create()
        for name in plan.copied_names:
            self.homes[name].write_span(name, 0, plan.reference[name].reshape(-1))
        self._flush()
        return Journal.begin(working, key)

    @property
    def scale(self) -> float:
        return self.plan.scale

    def write(self, name: str, start: int, values_N: Tensor) -> None:
        self.homes[name].write_span(name, start, values_N.cpu())

    @contextmanager
    def commits(self) -> Iterator[Callable[[TensorRecord], None]]:
        """A function that enters tensors that are written, as they come, into the journal."""
        group: list[TensorRecord] = []
        num_bytes, since = 0, time.monotonic()
        running: list[Future[None]] = []

        def add(record: TensorRecord) -> None:
            nonlocal group, num_bytes, since
            group.append(record)
            num_bytes += self.homes[record.name].specs[record.name].num_bytes
            if num_bytes >= COMMIT_BYTES or time.monotonic() - since > COMMIT_SECONDS:
                running.append(committer.submit(self._commit, group))
                group, num_bytes, since = [], 0, time.monotonic()

        with ThreadPoolExecutor(1, "commit") as committer:
            yield add
        for future in running:
            future.result()

    def _commit(self, group: list[TensorRecord]) -> None:
        self._flush()
        self._journal.append(group)

    def _flush(self) -> None:
        for file in self._files:
            file.flush()


def _ascends(places: Sequence[int]) -> bool:
    return all(first < second for first, second in pairwise(places))
