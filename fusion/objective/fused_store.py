"""What training reads: pivot tokens and their fused sparse targets, memory-mapped, in content-hash order.

Array legend: D dialogues, N tokens of a dialogue, R supervised rows, K entries per row.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from fusion.cache import write_json
from fusion.dialogues.encode import Encoded
from fusion.objective.fuse import FusedDialogue
from fusion.objective.target_form import TargetForm
from fusion.teaching.sparse_rows import SparseRows, SparseRowStore


@dataclass(frozen=True)
class FusedExample:
    """One dialogue, ready for a batch."""

    ids_N: np.ndarray
    """int32 pivot tokens."""
    rows_R: np.ndarray
    """int64 positions t whose row predicts token t + 1."""
    targets: SparseRows
    """The fused target of every row; an empty row has no fusion term."""


class FusedStore:
    """`examples` lists the dialogues to train on by content hash, repeats included; `summary` says who won and why."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._rows = SparseRowStore(folder)

    def __reduce__(self) -> tuple[type["FusedStore"], tuple[Path]]:
        """Mapped files do not travel to another process; it opens its own."""
        return type(self), (self.folder,)

    @staticmethod
    def write(
        folder: Path,
        encoded: Mapping[str, Encoded],
        fused: Mapping[str, FusedDialogue],
        examples: Sequence[str],
        summary: Mapping[str, object],
        form: TargetForm,
    ) -> None:
        """Write the dialogues of `fused`; `examples` are the ones to train on, in the order of the input."""
        names = sorted(fused)
        SparseRowStore.write(folder, {name: fused[name].rows for name in names})
        for name, arrays in {
            "tokens": [encoded[content_hash].ids_N for content_hash in names],
            "positions": [encoded[content_hash].rows_R for content_hash in names],
        }.items():
            np.save(folder / f"{name}.npy", np.concatenate(arrays))
            np.save(folder / f"{name}_indptr.npy", np.cumsum([0, *map(len, arrays)]))
        winners = {content_hash: fused[content_hash].winner for content_hash in names}
        write_json(folder / "winners.json", winners)
        write_json(folder / "examples.json", list(examples))
        write_json(folder / "summary.json", dict(summary))
        write_json(folder / "form.json", form.to_json())

    @cached_property
    def examples(self) -> list[str]:
        return json.loads((self.folder / "examples.json").read_text("utf-8"))

    @cached_property
    def winners(self) -> dict[str, str]:
        return json.loads((self.folder / "winners.json").read_text("utf-8"))

    @cached_property
    def summary(self) -> dict[str, object]:
        return json.loads((self.folder / "summary.json").read_text("utf-8"))

    @cached_property
    def form(self) -> TargetForm:
        """What the targets say: training takes the loss that belongs to it."""
        return TargetForm.from_json(json.loads((self.folder / "form.json").read_text("utf-8")))

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of every example: int64 [len(examples)]."""
        return np.asarray([self._span("tokens", name)[1] - self._span("tokens", name)[0] for name in self.examples])

    @cached_property
    def num_rows(self) -> np.ndarray:
        """Supervised rows of every example: int64 [len(examples)]."""
        spans = [self._span("positions", name) for name in self.examples]
        return np.asarray([last - first for first, last in spans])

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, number: int) -> FusedExample:
        name = self.examples[number]
        return FusedExample(self._slice("tokens", name), self._slice("positions", name), self._rows[name])

    @cached_property
    def _place(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self._rows)}

    @cached_property
    def _arrays(self) -> dict[str, np.ndarray]:
        names = ("tokens", "tokens_indptr", "positions", "positions_indptr")
        return {name: np.load(self.folder / f"{name}.npy", mmap_mode="r") for name in names}

    def _span(self, array: str, name: str) -> tuple[int, int]:
        indptr, place = self._arrays[f"{array}_indptr"], self._place[name]
        return int(indptr[place]), int(indptr[place + 1])

    def _slice(self, array: str, name: str) -> np.ndarray:
        first, last = self._span(array, name)
        return np.asarray(self._arrays[array][first:last])
