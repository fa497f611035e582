"""Tensors with a row for every token, seen in the rows of a merged vocabulary.

A row that a model lacks is the base's, which is a delta of zero. Where the base lacks the token too, the row is the
mean of those that the others have, and so is the base's: of one such model the row stays, of several the method merges
what they differ from their mean by. Shapes: I inputs, V merged rows.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fusion.merging.checkpoints.checkpoint import Checkpoint
from fusion.merging.checkpoints.tensor_file import TensorHome, TensorSpec, read_whole
from fusion.merging.layers import LAYER
from fusion.merging.vocabularies.vocabulary import NONE, Vocabulary

POSITIONS = re.compile(r"position|\bwpe\b")


@dataclass(frozen=True, eq=False)
class TokenRows:
    """One input's tensor, its rows in the order of the merged ones."""

    name: str
    own: int
    """Which of the inputs it is."""
    homes: Sequence[TensorHome]
    """The tensor of all inputs."""
    rows_IV: np.ndarray
    has_base: bool

    @property
    def path(self) -> Path:
        return self.homes[self.own].path

    @cached_property
    def spec(self) -> TensorSpec:
        spec = self.homes[0].specs[self.name]
        return TensorSpec(spec.dtype, (self.rows_IV.shape[1], *spec.shape[1:]))

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        return {self.name: self.spec}

    def end(self, name: str) -> int:
        return self.homes[self.own].end(name)

    def read(self, name: str) -> Tensor:
        return read_whole(self, name)

    @cached_property
    def _lender_V(self) -> np.ndarray:
        """The input whose row it is; -1: the mean of several."""
        known_IV = self.rows_IV != NONE
        alone_V = np.where(known_IV.sum(axis=0) == 1, known_IV.argmax(axis=0), NONE)
        lender_V = np.where(known_IV[0], 0, alone_V) if self.has_base else alone_V
        return np.where(known_IV[self.own], self.own, lender_V)

    def read_span(self, name: str, start: int, into_N: Tensor) -> None:
        """Fill `into_N` with the elements from `start` on; rows that lie one behind the other are read together."""
        width = self.spec.num_elements // len(self._lender_V)
        first, last = start // width, -(-(start + len(into_N)) // width)
        lender = self._lender_V[first:last]
        row = self.rows_IV[lender, np.arange(first, last)]
        breaks = (np.diff(row) != 1) | (np.diff(lender) != 0) | (lender[1:] == NONE)
        for run in np.split(np.arange(first, last), np.flatnonzero(breaks) + 1):
            begin, stop = max(int(run[0]) * width, start), min((int(run[-1]) + 1) * width, start + len(into_N))
            place = int(run[0]) - first
            self._read_run(
                int(lender[place]), int(run[0]), begin - int(run[0]) * width, into_N[begin - start : stop - start]
            )

    def _read_run(self, lender: int, merged_row: int, skipped: int, into_N: Tensor) -> None:
        """Elements from merged row `merged_row` on, without the first `skipped` ones."""
        width = self.spec.num_elements // len(self._lender_V)
        rows_I = self.rows_IV[:, merged_row]
        if lender != NONE:
            self.homes[lender].read_span(self.name, int(rows_I[lender]) * width + skipped, into_N)
            return
        lent_N, total_N = torch.empty_like(into_N), torch.zeros(len(into_N), dtype=torch.float64)
        lenders = np.flatnonzero(rows_I != NONE)
        for one in lenders.tolist():
            self.homes[one].read_span(self.name, int(rows_I[one]) * width + skipped, lent_N)
            total_N += lent_N
        into_N.copy_(total_N / len(lenders))


def in_rows_of(
    checkpoints: Sequence[Checkpoint], sizes: Sequence[int], vocabulary: Vocabulary, has_base: bool
) -> list[Checkpoint]:
    """The inputs, which have so many rows for tokens, with those of the merged vocabulary."""
    names = [name for name in checkpoints[0] if _has_row_for_each(name, checkpoints, sizes)]
    fitted = [dict(checkpoint.homes) for checkpoint in checkpoints]
    for name in names:
        homes = [checkpoint.homes[name] for checkpoint in checkpoints]
        for i, own in enumerate(fitted):
            if not np.array_equal(vocabulary.rows_IV[i], np.arange(sizes[i])):
                own[name] = TokenRows(name, i, homes, vocabulary.rows_IV, has_base)
    return [replace(checkpoint, homes=own) for checkpoint, own in zip(checkpoints, fitted, strict=True)]


def _has_row_for_each(name: str, checkpoints: Sequence[Checkpoint], sizes: Sequence[int]) -> bool:
    """Whether a tensor has a row for each token, in all models."""
    if LAYER.match(name) or POSITIONS.search(name) or not all(name in checkpoint for checkpoint in checkpoints):
        return False
    specs = [checkpoint.homes[name].specs[name] for checkpoint in checkpoints]
    shape = specs[0].shape
    is_table = len(shape) == 2 or (len(shape) == 1 and name.endswith("bias"))
    alike = {(spec.dtype, len(spec.shape), spec.shape[1:]) for spec in specs}
    return is_table and len(alike) == 1 and [spec.shape[0] for spec in specs] == list(sizes)
