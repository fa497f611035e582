"""The published alignment path: dynamic time warping over the edit distances of token strings, exactly.

https://arxiv.org/abs/2401.10491 (section 3.2) and the authors' code. Every cell costs the edit distance of its two
pieces; the back-trace prefers the diagonal, then the step along the pivot, then the step along the source.
The same path comes out much faster here: distances are computed once per pair of distinct pieces, and cells that no
path below a bound can use are never entered. The bound is the cost of a path that is found beside the diagonal.
Legend: N source positions, M pivot positions, U distinct pieces of one side.
"""

from collections.abc import Sequence

import numpy as np
from numba import njit
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

DIAGONAL, ALONG_PIVOT, ALONG_SOURCE = 0, 1, 2
UNREACHED = 1 << 30
BESIDE = 8
"""Columns on both sides of the most promising one that the search for a bound looks at."""


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
    (source, source_N), (pivot, pivot_M) = _numbered(source_pieces), _numbered(pivot_pieces)
    distance_UU = _distances(pivot, source, pivot_marker, source_marker)
    source_rest_N, pivot_rest_M = _rest(distance_UU.min(axis=0)[source_N]), _rest(distance_UU.min(axis=1)[pivot_M])
    costs = source_N, pivot_M, distance_UU, source_rest_N, pivot_rest_M
    some_path, bound, slack = _some_path(*costs), max(source_rest_N[0], pivot_rest_M[0]), 64 + len(pivot_M) // 4
    while True:
        bound, slack = min(bound + slack, some_path), 2 * slack
        steps, reached = _best_steps(*costs, bound)
        if reached:
            return _back_trace(*steps, len(source_N))


def _numbered(pieces: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Distinct pieces in order of appearance, and the number of every piece, int32."""
    number = {piece: u for u, piece in enumerate(dict.fromkeys(pieces))}
    return list(number), np.fromiter(map(number.__getitem__, pieces), dtype=np.int32, count=len(pieces))


def _distances(pivot: list[str], source: list[str], pivot_marker: str, source_marker: str) -> np.ndarray:
    """int32 [U_pivot, U_source]: edit distances without the markers, with them where either is nothing else."""
    bare_pivot = [piece.replace(pivot_marker, "") for piece in pivot]
    bare_source = [piece.replace(source_marker, "") for piece in source]
    distance_UU = cdist(bare_pivot, bare_source, scorer=Levenshtein.distance, dtype=np.int32)
    for u in [u for u, piece in enumerate(bare_pivot) if not piece]:
        distance_UU[u] = cdist(pivot[u : u + 1], source, scorer=Levenshtein.distance, dtype=np.int32)[0]
    for v in [v for v, piece in enumerate(bare_source) if not piece]:
        distance_UU[:, v] = cdist(pivot, source[v : v + 1], scorer=Levenshtein.distance, dtype=np.int32)[:, 0]
    return distance_UU


def _rest(cheapest_N: np.ndarray) -> np.ndarray:
    """int64 [N]: what any path must still pay behind each position, which it visits one by one."""
    total_N = np.cumsum(cheapest_N, dtype=np.int64)
    return total_N[-1] - total_N


@njit(cache=True, nogil=True)
def _some_path(
    source_N: np.ndarray,
    pivot_M: np.ndarray,
    distance_UU: np.ndarray,
    source_rest_N: np.ndarray,
    pivot_rest_M: np.ndarray,
) -> int:
    """Cost of a good path, found beside the most promising cell of every row: no best path costs more."""
    M, N = len(pivot_M), len(source_N)
    above, here = np.empty(N, dtype=np.int64), np.empty(N, dtype=np.int64)
    first, last, centre = 0, -1, 0  # what was looked at in the row above, and the best of it
    for i in range(M):
        start, stop = max(0, centre - BESIDE), (N if i == M - 1 else min(N, centre + BESIDE + 2))
        left, promise = UNREACHED, 2 * UNREACHED
        for j in range(start, stop):
            best = min(left, 0 if i == 0 and j == 0 else UNREACHED)
            if first <= j <= last:
                best = min(best, above[j])
            if first < j <= last + 1:
                best = min(best, above[j - 1])
            left = min(best + distance_UU[pivot_M[i], source_N[j]], UNREACHED)
            here[j], total = left, left + max(pivot_rest_M[i], source_rest_N[j])
            if total <= promise:
                promise, centre = total, j
        first, last = start, stop - 1
        above, here = here, above
    return above[N - 1]


@njit(cache=True, nogil=True)
def _best_steps(
    source_N: np.ndarray,
    pivot_M: np.ndarray,
    distance_UU: np.ndarray,
    source_rest_N: np.ndarray,
    pivot_rest_M: np.ndarray,
    bound: int,
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], bool]:
    """The step by which the cheapest path enters each cell, and whether the last cell costs at most `bound`.

    The steps are uint8, row after row: the first of row i is number `begin_M[i]` and stands in column `first_M[i]`.
    Only cells from which a path of at most `bound` may still end have a meaning. All cells of the best path are among
    them if it costs no more, and so is every neighbour that ties with one: hence the same path as without a bound.
    """
    M, N = len(pivot_M), len(source_N)
    steps, used = np.empty(N + 64 * M, dtype=np.uint8), 0
    begin_M, first_M = np.empty(M, dtype=np.int64), np.empty(M, dtype=np.int64)
    above, here = np.empty(N, dtype=np.int64), np.empty(N, dtype=np.int64)
    first, last = 0, -1  # where the row above was entered
    for i in range(M):
        start, stop, left = first, last, UNREACHED
        first, last = N, -1
        begin_M[i], first_M[i] = used, start
        if used + N - start > len(steps):
            longer = np.empty(2 * (used + N), dtype=np.uint8)
            longer[:used] = steps[:used]
            steps = longer
        cost_U, pivot_rest = distance_UU[pivot_M[i]], pivot_rest_M[i]
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
            cost = best + cost_U[source_N[j]]
            left = UNREACHED
            if cost + max(pivot_rest, source_rest_N[j]) <= bound:
                left = cost
                first, last = min(first, j), j
            steps[used + j - start], here[j] = move, left
        used += max(last - start + 1, 0)
        above, here = here, above
    return (steps, begin_M, first_M), last == N - 1


@njit(cache=True, nogil=True)
def _back_trace(
    steps: np.ndarray, begin_M: np.ndarray, first_M: np.ndarray, num_source: int
) -> tuple[np.ndarray, np.ndarray]:
    """First and last source position at every pivot position, int32 [M]."""
    M = len(begin_M)
    lo_M, hi_M = np.full(M, num_source, dtype=np.int32), np.full(M, -1, dtype=np.int32)
    i, j = M - 1, num_source - 1
    while True:
        lo_M[i], hi_M[i] = min(lo_M[i], j), max(hi_M[i], j)
        if i == 0 and j == 0:
            return lo_M, hi_M
        move = steps[begin_M[i] + j - first_M[i]]
        i, j = i - (move != ALONG_SOURCE), j - (move != ALONG_PIVOT)
