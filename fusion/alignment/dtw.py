"""The published alignment path: dynamic time warping over the edit distances of token strings, exactly.

https://arxiv.org/abs/2401.10491 (section 3.2) and the authors' code. Every cell costs the edit distance of its two
pieces; the back-trace prefers the diagonal, then the step along the pivot, then the step along the source.
The same path comes out much faster here: distances are computed once per pair of distinct pieces, and cells that no
path below a bound can use are never entered; a bound below the best path is raised.
Legend: N source positions, M pivot positions, U distinct pieces of one side.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from numba import njit
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

DIAGONAL, ALONG_PIVOT, ALONG_SOURCE = 0, 1, 2
UNREACHED = 1 << 30


def dtw_path(
    source_pieces: Sequence[str],
    pivot_pieces: Sequence[str],
    *,
    source_marker: str = "Ġ",
    pivot_marker: str = "▁",
) -> tuple[np.ndarray, np.ndarray]:
    """int32 [M] twice: first and last (inclusive) source position on the path at every pivot position.

    Pieces are decoded tokens. A side's space marker is removed from its own pieces before two are compared, unless
    that leaves one of them empty. Raises ValueError when just one side has no pieces.
    """
    if not len(source_pieces) and not len(pivot_pieces):
        return np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.int32)
    if not len(source_pieces) or not len(pivot_pieces):
        raise ValueError("a path needs pieces on both sides")
    source_N, pivot_M = _numbered(source_pieces), _numbered(pivot_pieces)
    distance_UU = _distances(dict.fromkeys(source_pieces), dict.fromkeys(pivot_pieces), source_marker, pivot_marker)
    source_rest_N, pivot_rest_M = _rest(distance_UU.min(axis=1)[source_N]), _rest(distance_UU.min(axis=0)[pivot_M])
    bound, slack = max(source_rest_N[0], pivot_rest_M[0]), 16 + len(pivot_M) // 16
    while True:
        bound, slack = bound + slack, 2 * slack
        step_MN, reached = _steps(source_N, pivot_M, distance_UU, source_rest_N, pivot_rest_M, bound)
        if reached:
            return _back_trace(step_MN)


def _numbered(pieces: Sequence[str]) -> np.ndarray:
    """int32: distinct pieces are numbered in order of appearance."""
    number: dict[str, int] = {}
    return np.array([number.setdefault(piece, len(number)) for piece in pieces], dtype=np.int32)


def _distances(source: Iterable[str], pivot: Iterable[str], source_marker: str, pivot_marker: str) -> np.ndarray:
    """int32 [U_source, U_pivot]: edit distances without the markers, with them where either is nothing else."""
    raw = list(source), list(pivot)
    bare = (
        [piece.replace(source_marker, "") for piece in raw[0]],
        [piece.replace(pivot_marker, "") for piece in raw[1]],
    )
    distance_UU = cdist(*bare, scorer=Levenshtein.distance, dtype=np.int32)
    for u in np.flatnonzero([not piece for piece in bare[0]]):
        distance_UU[u] = cdist(raw[0][u : u + 1], raw[1], scorer=Levenshtein.distance, dtype=np.int32)[0]
    for v in np.flatnonzero([not piece for piece in bare[1]]):
        distance_UU[:, v] = cdist(raw[0], raw[1][v : v + 1], scorer=Levenshtein.distance, dtype=np.int32)[:, 0]
    return distance_UU


def _rest(cheapest_N: np.ndarray) -> np.ndarray:
    """int64: what any path must still pay behind each position, which it visits one by one."""
    total_N = np.cumsum(cheapest_N, dtype=np.int64)
    return total_N[-1] - total_N


@njit(cache=True, nogil=True)
def _steps(
    source_N: np.ndarray,
    pivot_M: np.ndarray,
    distance_UU: np.ndarray,
    source_rest_N: np.ndarray,
    pivot_rest_M: np.ndarray,
    bound: int,
) -> tuple[np.ndarray, bool]:
    """Step by which the cheapest path enters each cell, uint8 [M, N], and whether the last cell costs at most `bound`.

    Only cells from which a path of at most `bound` may still end have a meaning. All cells of the best path are among
    them if it costs no more, and so is every neighbour that ties with one: hence the same path as without a bound.
    """
    M, N = len(pivot_M), len(source_N)
    step_MN = np.empty((M, N), dtype=np.uint8)  # pages that are never entered are never touched
    above, here = np.empty(N, dtype=np.int64), np.empty(N, dtype=np.int64)
    first, last = 0, -1  # where the row above was entered
    for i in range(M):
        start, stop, left = first, last, UNREACHED
        first, last = N, -1
        for j in range(start, N):
            best, move = (0 if i == 0 and j == 0 else UNREACHED), DIAGONAL
            if start < j <= stop + 1:
                best = above[j - 1]
            if j <= stop and above[j] < best:
                best, move = above[j], ALONG_PIVOT
            if left < best:
                best, move = left, ALONG_SOURCE
            if best == UNREACHED and j > stop:
                break
            cost = best + distance_UU[source_N[j], pivot_M[i]]
            left = UNREACHED
            if cost + max(pivot_rest_M[i], source_rest_N[j]) <= bound:
                step_MN[i, j], left = move, cost
                first, last = min(first, j), j
            here[j] = left
        above, here = here, above
    return step_MN, last == N - 1


@njit(cache=True, nogil=True)
def _back_trace(step_MN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    M, N = step_MN.shape
    lo, hi = np.full(M, N, dtype=np.int32), np.full(M, -1, dtype=np.int32)
    i, j = M - 1, N - 1
    while True:
        lo[i], hi[i] = min(lo[i], j), max(hi[i], j)
        if i == 0 and j == 0:
            return lo, hi
        move = step_MN[i, j]
        i, j = i - (move != ALONG_SOURCE), j - (move != ALONG_PIVOT)
