"""Sequence dimension: which row of the source has read the same text as a row of the pivot.

Row t of a model holds p(. | tokens 0..t): it has read token t and predicts token t + 1.
Legend: N tokens of a sequence, R rows chosen from it.
"""

from dataclasses import dataclass

import numpy as np
from numba import njit
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
    about the next byte when the source reads tokens of no width there. Time O(n + m).
    """
    return _last_equal(np.asarray(pivot_ends, dtype=np.int64), np.asarray(source_ends, dtype=np.int64))


@njit(cache=True, nogil=True)
def _last_equal(pivot_R: np.ndarray, source_S: np.ndarray) -> np.ndarray:
    rows_R = np.full(len(pivot_R), UNALIGNED, dtype=np.int32)
    ahead, last = 0, UNALIGNED  # first source row not looked at, last known one before it
    for r in range(len(pivot_R)):
        end = pivot_R[r]
        if end < 0:
            continue
        while ahead < len(source_S) and source_S[ahead] <= end:
            if source_S[ahead] >= 0:
                last = ahead
            ahead += 1
        if last >= 0 and source_S[last] == end:
            rows_R[r] = last
    return rows_R


def same_start(pivot: Rows, source: Rows, rows_R: np.ndarray) -> np.ndarray:
    """bool [R_pivot]: the tokens read at the pivot row and at source row `rows_R` start at the same byte."""
    if not len(source):
        return np.zeros(len(pivot), dtype=bool)
    return (pivot.starts >= 0) & (pivot.starts == source.starts[rows_R])


def ends_together(pivot: Rows, source: Rows, rows_R: np.ndarray) -> np.ndarray:
    """bool [R_pivot]: the tokens predicted at the pivot row and at source row `rows_R` end at the same byte.

    `pivot` and `source` are all rows of one dialogue: the token that a row predicts is read at the next one.
    """
    if not len(source):
        return np.zeros(len(pivot), dtype=bool)
    pivot_R, source_S = (np.append(rows.ends[1:], UNKNOWN) for rows in (pivot, source))
    return (pivot_R >= 0) & (pivot_R == source_S[rows_R])


def inner_rows(pivot_ends: ArrayLike, source_ends: ArrayLike) -> np.ndarray:
    """int32 [R_pivot]: the source row before the token that the pivot row's place lies inside of, else -1.

    Whatever lies on a boundary of the source, or beside places that are unknown, has none. All rows of one dialogue.
    """
    pivot_R, source_S = np.asarray(pivot_ends, dtype=np.int64), np.asarray(source_ends, dtype=np.int64)
    known = np.flatnonzero(source_S >= 0)
    behind = np.searchsorted(source_S[known], pivot_R, side="left")
    inside = np.flatnonzero((pivot_R >= 0) & (behind > 0) & (behind < len(known)))
    before, after = known[behind[inside] - 1], known[behind[inside]]
    cut = (after == before + 1) & (source_S[after] > pivot_R[inside])
    rows_R = np.full(len(pivot_R), UNALIGNED, dtype=np.int32)
    rows_R[inside[cut]] = before[cut]
    return rows_R
