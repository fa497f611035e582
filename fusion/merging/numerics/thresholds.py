"""Where the largest elements of a tensor, or of a whole model, end: guessed from a sample, found exactly by a pass.

Non-negative floats have the order of their bit patterns. A sample tells between which two patterns the threshold
should lie; a pass counts the elements above and gathers those between, among which it is then found. Where the guess
was wrong, or more lies between than may be kept, the pass leaves narrower bounds for the next guess: the result is
exact, whatever the sample. Shapes: K keys of a block (such as magnitudes of K targets), N elements of a block, M
elements of a sample or gathered.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

from fusion.merging.deltas import BLOCK_ELEMENTS, Block, Passes
from fusion.merging.numerics.arithmetic import on_cpu, rows
from fusion.merging.numerics.one_pass import Span

GATHERED = 1 << 22
"""Elements of a key that one pass may gather: 16 MiB."""
DEVIATIONS = 3.0
"""How far guesses lie from the estimate, in standard deviations of a rank in a random sample."""
RUN = 1024
FEW = RUN // 32
"""Flagged elements of a run, below which it is quicker to look where they are."""
HIGHEST, MAGNITUDE = 0x7FFF_FFFF, np.uint32(0x7FFF_FFFF)
"""NaN is above infinity here: variances of huge deltas overflow to it, and no pattern may lie beyond the bounds."""
Keys = Callable[[Block], Tensor]
"""float32 [K, N] of a block, whose magnitudes count."""
Wanted = Callable[[int], int]
"""How many of the largest elements are wanted, out of so many that are not zero."""


class Threshold(NamedTuple):
    """What is above `level` is selected; what equals it too in blocks before `position`, and `rest` in that block."""

    level: float
    position: float
    rest: int

    def rest_in(self, block: Block | Span) -> int:
        """How many elements of a block that equal the level are selected, those with the lowest index."""
        if block.position == self.position:
            return self.rest
        return block.num_elements if block.position < self.position else 0


NOTHING = Threshold(math.inf, 0, 0)


class Guess(NamedTuple):
    """The first and the last bit pattern of magnitudes between which the threshold should lie."""

    low: int
    high: int


class Counted(NamedTuple):
    """One key of one block, compared with a guess."""

    position: int
    num_zeros: int
    above: int
    between: int
    gathered_M: np.ndarray
    """Patterns of those between, int32, in the order of elements; not all of them, if they are too many."""


class _Search:
    """What is known of one key's threshold: the bounds that it lies in, and some of the elements there."""

    def __init__(self, wanted: Wanted, num_elements: int, sample_M: np.ndarray) -> None:
        self._wanted, self._num_elements = wanted, num_elements
        self._bounds, self._above, self._between = Guess(0, HIGHEST), 0, num_elements
        self._sample_M = np.sort(sample_M)
        self._count = self._num_wanted(round(float((sample_M > 0).mean()) * num_elements))
        self._crowded = False
        """Whether there is more within the bounds than a pass may gather."""
        self.found: Threshold | None = None

    def guess(self) -> Guess:
        size = len(self._sample_M)
        if not size:
            return self._bounds
        from_top = size * (self._count - self._above) / self._between
        rank = size - min(max(from_top, 0), size)
        margin = DEVIATIONS * math.sqrt(rank * (size - rank) / size) + 1
        first, last = math.floor(rank - margin), math.ceil(rank + margin)
        guess = Guess(
            int(self._sample_M[first]) if first >= 0 else self._bounds.low,
            int(self._sample_M[last]) if last < size else self._bounds.high,
        )
        if self._crowded and guess == self._bounds:
            middle = int(self._sample_M[min(int(rank), size - 1)])
            return Guess(middle, middle)
        return guess

    def learn(self, guess: Guess, blocks: Sequence[Counted]) -> None:
        """Take in what a pass found, block by block in the order of elements."""
        self._count = self._num_wanted(self._num_elements - sum(one.num_zeros for one in blocks))
        above, between = sum(one.above for one in blocks), sum(one.between for one in blocks)
        is_single = guess.low == guess.high
        if self._count <= 0:
            self.found = NOTHING
        elif self._count <= above:
            self._narrow(Guess(guess.high + 1, self._bounds.high), self._above, above - self._above)
        elif self._count > above + between:
            below = self._above + self._between - above - between
            self._narrow(Guess(self._bounds.low, guess.low - 1), above + between, below)
        elif is_single or sum(len(one.gathered_M) for one in blocks) == between:
            self.found = _exactly(self._count - above, guess.low if is_single else None, blocks)
        else:
            self._sample_M = np.sort(np.concatenate([one.gathered_M for one in blocks]))
            self._narrow(guess, above, between, crowded=True)

    def _num_wanted(self, num_nonzero: int) -> int:
        return min(self._wanted(num_nonzero), self._num_elements)

    def _narrow(self, bounds: Guess, above: int, between: int, crowded: bool = False) -> None:
        self._bounds, self._above, self._between, self._crowded = bounds, above, between, crowded
        first, stop = np.searchsorted(self._sample_M, [bounds.low, bounds.high + 1])
        self._sample_M = self._sample_M[first:stop]


def find_thresholds(passes: Passes, keys: Keys, wanted: Sequence[Wanted]) -> tuple[Threshold, ...]:
    """The thresholds of the `wanted[k]` largest elements of each key (all, if there are fewer).

    Of equal elements, those of lowest index are taken. Where more is wanted than there are keys, they take turns.
    """
    samples_KM = _patterns(passes.sample(keys)).numpy()
    searches = [_Search(one, passes.num_elements, samples_KM[k % len(samples_KM)]) for k, one in enumerate(wanted)]
    limit = max(1, GATHERED * BLOCK_ELEMENTS // passes.num_elements)
    while guesses := {k: search.guess() for k, search in enumerate(searches) if search.found is None}:
        by_block = passes.map(partial(_compare, keys, guesses, limit))
        for (k, guess), blocks in zip(guesses.items(), zip(*by_block, strict=True), strict=True):
            searches[k].learn(guess, blocks)
    return tuple(search.found for search in searches if search.found)


def _patterns(keys: Tensor) -> Tensor:
    """Bit patterns of magnitudes, int32."""
    return keys.abs().view(torch.int32)


def _compare(keys: Keys, guesses: dict[int, Guess], limit: int, block: Block) -> list[Counted]:
    """Compare the keys of a block with guesses; at most `limit` elements are gathered for each."""
    keys_KN = keys(block)
    return [
        Counted(block.position, *_compare_one(keys_KN[k % len(keys_KN)], guess, limit)) for k, guess in guesses.items()
    ]


def _compare_one(keys_N: Tensor, guess: Guess, limit: int) -> tuple[int, int, int, np.ndarray]:
    if on_cpu(keys_N):
        gathered_N = np.empty(len(keys_N) + 1, dtype=np.int32)
        counts = _compare_patterns(rows(keys_N).view(np.uint32), guess.low, guess.high, gathered_N)
        return *counts, gathered_N[: min(counts[2], limit) if guess.low < guess.high else 0].copy()
    patterns_N = _patterns(keys_N)
    between_M = patterns_N[(patterns_N >= guess.low) & (patterns_N <= guess.high)]
    counts = int((patterns_N == 0).sum()), int((patterns_N > guess.high).sum()), len(between_M)
    return *counts, between_M[:limit].cpu().numpy()


@njit(cache=True, nogil=True)
def _gather(keys_R: Any, flags_R: Any, gathered_N: Any, place: int) -> int:
    """Put magnitudes of flagged keys behind the `place` that are gathered; returns how many there are then."""
    for n in range(len(keys_R)):  # without a branch, which would be guessed wrong again and again
        gathered_N[place] = keys_R[n] & MAGNITUDE
        place += int(flags_R[n])
    return place


@njit(cache=True, nogil=True)
def _gather_few(keys_R: Any, flags_R: Any, gathered_N: Any, place: int) -> int:
    """As `_gather` for a run that is not cut short: eight are passed over where none of them is flagged."""
    flags_W = flags_R.view(np.uint64)
    for w in range(RUN // 8):
        if flags_W[w]:
            for n in range(8 * w, 8 * w + 8):
                gathered_N[place] = keys_R[n] & MAGNITUDE
                place += int(flags_R[n])
    return place


@njit(cache=True, nogil=True)
def _compare_patterns(keys_N: Any, low: int, high: int, gathered_N: Any) -> tuple[int, int, int]:
    """How many magnitudes of float32 bit patterns (uint32) are zero, above `high`, and from `low` to `high`.

    The last are put together in `gathered_N` (one longer than the keys), in their order, unless `low` equals `high`.
    """
    first, last, width = np.uint32(low), np.uint32(high), np.uint32(high - low)
    flags_R = np.zeros(RUN, dtype=np.uint8)
    num_zeros, above, between, place = 0, 0, 0, 0
    for start in range(0, len(keys_N), RUN):
        keys_R = keys_N[start : start + RUN]
        zeros_here = above_here = between_here = np.int32(0)
        for n in range(len(keys_R)):
            pattern = keys_R[n] & MAGNITUDE
            is_between = np.uint32(pattern - first) <= width
            zeros_here += np.int32(pattern == 0)
            above_here += np.int32(pattern > last)
            between_here += np.int32(is_between)
            flags_R[n] = np.uint8(is_between)
        num_zeros += int(zeros_here)
        above += int(above_here)
        between += int(between_here)
        if low == high or not between_here:
            continue
        if between_here < FEW and len(keys_R) == RUN:
            place = _gather_few(keys_R, flags_R, gathered_N, place)
        else:
            place = _gather(keys_R, flags_R, gathered_N, place)
    return num_zeros, above, between


def _exactly(missing: int, level: int | None, blocks: Sequence[Counted]) -> Threshold:
    """The threshold of the `missing` largest of the elements between; they all have the `level`, if there is one."""
    num_ties = sum(one.between for one in blocks)
    if level is None:
        between_M = np.sort(np.concatenate([one.gathered_M for one in blocks]))
        level = int(between_M[-missing])
        first, stop = np.searchsorted(between_M, [level, level + 1])
        missing, num_ties = missing - (len(between_M) - int(stop)), int(stop - first)
        blocks = [one._replace(between=int(np.count_nonzero(one.gathered_M == level))) for one in blocks]
    value = float(np.int32(level).view(np.float32))
    if missing == num_ties:
        return Threshold(value, math.inf, 0)
    for one in blocks:
        if one.between >= missing:
            return Threshold(value, one.position, missing)
        missing -= one.between
    raise AssertionError("more elements are wanted than were counted")
