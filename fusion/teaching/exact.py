"""Teacher rows as they are: 32-bit numbers, uncompressed. Array legend: R rows, E candidates of all rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np

from fusion.teaching.teacher_rows import TeacherRows, filled


@dataclass(frozen=True)
class Exact:
    """The exact coding: a block is a dialogue, of counts, ids, log-probabilities, tails and NLLs of 4 bytes each."""

    name: ClassVar[str] = "exact"
    block_rows: ClassVar[int] = 1
    """A dialogue is read alone."""

    @classmethod
    def of(cls, dialogues: Sequence[TeacherRows]) -> "Exact":
        return cls()

    @classmethod
    def from_bytes(cls, shared: bytes) -> "Exact":
        return cls()

    def to_bytes(self) -> bytes:
        return b""

    def encode(self, dialogues: Sequence[TeacherRows]) -> bytes:
        (rows,) = dialogues
        held_RK = rows.ids_RK >= 0
        columns = (
            rows.counts_R.astype("<u4"),
            rows.ids_RK[held_RK].astype("<i4"),
            rows.logprobs_RK[held_RK].astype("<f4"),
            rows.tail_R.astype("<f4"),
            rows.nll_R.astype("<f4"),
        )
        return b"".join(column.tobytes() for column in columns)

    def decode(self, data: np.ndarray, num_rows: Sequence[int]) -> list[TeacherRows]:
        counts_R, ids_E, logprobs_E, tail_R, nll_R = _columns(data, num_rows[0])
        held_RK = np.arange(counts_R.max()) < counts_R[:, None]
        return [TeacherRows(filled(held_RK, ids_E, -1), filled(held_RK, logprobs_E, -np.inf), tail_R, nll_R)]

    def parts(self, data: np.ndarray, num_rows: Sequence[int]) -> dict[str, int]:
        """Bytes of a block by what they say."""
        names = ("counts", "ids", "logprobs", "tail", "nll")
        return {name: column.nbytes for name, column in zip(names, _columns(data, num_rows[0]), strict=True)}


def _columns(data: np.ndarray, rows: int) -> tuple[np.ndarray, ...]:
    """(counts_R, ids_E, logprobs_E, tail_R, nll_R) of a block."""
    entries = int(data[: 4 * rows].view("<u4").sum())
    bounds = 4 * np.cumsum([0, rows, entries, entries, rows, rows])
    dtypes = ("<u4", "<i4", "<f4", "<f4", "<f4")
    return tuple(data[a:b].view(dtype) for (a, b), dtype in zip(pairwise(bounds), dtypes, strict=True))
