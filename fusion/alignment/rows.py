"""Sequence dimension: which row of the source has read the same text as a row of the pivot.

Row t of a model holds p(. | tokens 0..t): it has read token t and predicts token t + 1.
Legend: N tokens of a sequence, R rows chosen from it.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

UNALIGNED = -1
UNKNOWN = -1


@dataclass(frozen=True)
class Rows:
    """Rows of one model on one dialogue; byte places are in the coordinate that all models of the dialogue share."""

    starts: np.ndarray
    """int64 [R]: the byte where the token read at the row starts; -1 where unknown."""
    ends: np.ndarray
    """int64 [R], ascending: the bytes read once the row's token is read; -1 where unknown (never aligned)."""
    read: np.ndarray
    """int64 [R]: id of the token read at the row."""
    next: np.ndarray
    """int64 [R]: id of the reference token that the row predicts; -1 behind the last token."""

    def __len__(self) -> int:
        return len(self.ends)

    @classmethod
    def of(cls, ids: ArrayLike, ends: ArrayLike, rows: ArrayLike | None = None) -> "Rows":
        """The `rows` (positions [R]; all when None) of a whole sequence: its ids [N] and byte ends [N].

        Give an end-of-turn a width of its own when rows behind it are asked for: they have read one event more than
        the rows before it.
        """
        ids_N, ends_N = np.asarray(ids, dtype=np.int64), np.asarray(ends, dtype=np.int64)
        starts_N = np.concatenate([np.zeros(1, dtype=np.int64), ends_N])[: len(ids_N)]
        next_N = np.append(ids_N[1:], UNKNOWN)[: len(ids_N)]
        chosen = slice(None) if rows is None else np.asarray(rows, dtype=np.int64)
        return cls(starts_N[chosen], ends_N[chosen], ids_N[chosen], next_N[chosen])


def boundary_rows(pivot_ends: ArrayLike, source_ends: ArrayLike) -> np.ndarray:
    """int32 [R_pivot]: the last source row that has read exactly the bytes of the pivot row, else -1.

    Both ends ascend (cumulative bytes). Negative ends are unknown and never align. The last row is the one that speaks
    about the next byte when the source reads tokens of no width there. Time O(n log m), in practice linear.
    """
    pivot_R, source_S = np.asarray(pivot_ends, dtype=np.int64), np.asarray(source_ends, dtype=np.int64)
    known = np.flatnonzero(source_S >= 0)
    if not known.size:
        return np.full(len(pivot_R), UNALIGNED, dtype=np.int32)
    last = np.searchsorted(source_S[known], pivot_R, side="right") - 1
    same = (last >= 0) & (source_S[known[last]] == pivot_R)
    return np.where(same, known[last], UNALIGNED).astype(np.int32)


def one_to_one_rows(pivot: Rows, source: Rows) -> np.ndarray:
    """int32 [R_pivot]: source row whose token covers exactly the bytes of the token read at the pivot row, else -1."""
    rows_R = boundary_rows(pivot.ends, source.ends)
    return np.where((rows_R >= 0) & same_start(pivot, source, rows_R), rows_R, UNALIGNED).astype(np.int32)


def same_start(pivot: Rows, source: Rows, rows_R: np.ndarray) -> np.ndarray:
    """bool [R_pivot]: the tokens read at the pivot row and at source row `rows_R` start at the same byte."""
    if not len(source):
        return np.zeros(len(pivot), dtype=bool)
    return (pivot.starts >= 0) & (pivot.starts == source.starts[rows_R])
