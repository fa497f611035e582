"""Which elements take part in a merge: the largest, the most varying. Found by counting, without sorting.

Non-negative floats have the order of their bit patterns. One pass counts the upper halves of the patterns, which tells
in which of them the threshold lies; a second pass counts the lower halves there. A third finds out up to where the
elements that equal the threshold are taken: those with the lowest index. So a selection over a whole model takes no
more memory than one over a tensor. Shapes: K keys of a block (such as magnitudes of K targets), N elements, H halves.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fusion.merging.deltas import Block, ModelDeltas, Passes, TensorDeltas
from fusion.merging.numerics import kernels
from fusion.merging.numerics.arithmetic import on_cpu, rows
from fusion.merging.numerics.workspace import scratch

NOTHING_SELECTED = "the targets differ at too few positions: nothing is selected, the base stays"
HALF = 1 << 16
UPPER_HALVES = 1 << 15
Keys = Callable[[Block], Tensor]
"""float32 [K, N] of a block, whose magnitudes count."""
Trimmer = Callable[[Block], Tensor]
"""The deltas of a block that stay, float32 [J, N]."""


class Threshold(NamedTuple):
    """What is above `level` is selected; what equals it too in blocks before `position`, and `rest` in that block."""

    level: float
    position: float
    rest: int

    def rest_in(self, block: Block) -> int:
        """How many elements of a block that equal the level are selected, those with the lowest index."""
        if block.position == self.position:
            return self.rest
        return block.num_elements if block.position < self.position else 0


NOTHING = Threshold(math.inf, 0, 0)


@dataclass(frozen=True)
class Selected:
    """The largest elements of each key."""

    thresholds: tuple[Threshold, ...]

    def keep(self, block: Block, keys_KN: Tensor, values_JN: Tensor, kept_JN: Tensor) -> Tensor:
        """The values that are selected, else zero, into `kept_JN`: by a key for each row, or one for all (K = 1)."""
        levels_K = torch.tensor([threshold.level for threshold in self.thresholds])
        rests_K = torch.tensor([threshold.rest_in(block) for threshold in self.thresholds])
        if on_cpu(values_JN):
            thresholds = levels_K.numpy(), rests_K.numpy()
            kernels.keep_largest(rows(values_JN), rows(keys_KN), *thresholds, kept_JN.numpy())
            return kept_JN
        mask_KN = torch.ge(keys_KN.abs(), levels_K[:, None].to(keys_KN))
        for rest, level, keys_N, mask_N in zip(rests_K.tolist(), levels_K.tolist(), keys_KN, mask_KN, strict=True):
            mask_N[torch.nonzero(keys_N.abs() == level)[rest:, 0]] = False
        return torch.mul(values_JN, mask_KN, out=kept_JN)

    def mask(self, block: Block, keys_KN: Tensor) -> Tensor:
        """1.0 where an element of the block is selected, else 0.0, [K, N]."""
        return self.keep(block, keys_KN, torch.ones_like(keys_KN), torch.empty_like(keys_KN))

    def note(self, block: Block, keys_KN: Tensor) -> None:
        block.note("selected", lambda: (int(self.mask(block, keys_KN).sum()), keys_KN.numel()))


@dataclass(frozen=True)
class KeyCounts:
    """How many elements of the keys have each upper half, [K, H]; half 0 is that of zeros alone."""

    keys: Keys
    counts_KH: Tensor

    @property
    def num_elements(self) -> list[int]:
        return self.counts_KH.sum(dim=1).tolist()

    @property
    def num_nonzero(self) -> list[int]:
        return self.counts_KH[:, 1:].sum(dim=1).tolist()


def count_keys(passes: Passes, keys: Keys, num_keys: int) -> KeyCounts:
    """The first pass of a selection."""

    def count(block: Block, counts_KH: Tensor) -> None:
        keys_KN = keys(block)
        if on_cpu(keys_KN):
            kernels.count_upper_halves(rows(keys_KN).view(np.uint32), counts_KH.numpy())
            return
        for counts_H, halves_N in zip(counts_KH, _patterns(keys_KN) >> 16, strict=True):
            counts_H += torch.bincount(halves_N, minlength=UPPER_HALVES).cpu()

    return KeyCounts(keys, passes.tally((num_keys, UPPER_HALVES), count))


def largest(passes: Passes, counted: KeyCounts, counts: Sequence[int]) -> Selected:
    """The `counts[k]` largest elements of each key (all, if there are fewer); of equal ones, those of lowest index."""
    counts = [min(count, all_) for count, all_ in zip(counts, counted.num_elements, strict=True)]
    levels_K, wanted, ties = _levels(passes, counted, counts)
    found = [Threshold(level, math.inf, 0) for level in levels_K.tolist()]
    if any(0 < count < tied for count, tied in zip(wanted, ties, strict=True)):
        found = _cut_ties(passes, counted.keys, levels_K, wanted)
    return Selected(tuple(NOTHING if count <= 0 else one for one, count in zip(found, counts, strict=True)))


def order_statistics(passes: Passes, key: Keys, ranks: Sequence[int]) -> list[float]:
    """The elements of one key ([1, N] of a block) that have the given ranks, 0 for the smallest."""
    counted = count_keys(passes, key, 1)
    num_elements, num_ranks = counted.num_elements[0], len(ranks)
    repeated = KeyCounts(lambda block: key(block).expand(num_ranks, -1), counted.counts_KH.expand(num_ranks, -1))
    return _levels(passes, repeated, [num_elements - rank for rank in ranks])[0].tolist()


def _levels(passes: Passes, counted: KeyCounts, counts: Sequence[int]) -> tuple[Tensor, list[int], list[int]]:
    """The second pass: the smallest of the `counts[k]` largest [K], how many equal ones are wanted, and are there."""
    uppers, wanted = _find(counted.counts_KH, counts)
    lower_counts_KH = passes.tally((len(uppers), HALF), partial(_count_lower, counted.keys, uppers))
    lowers, wanted = _find(lower_counts_KH, wanted)
    patterns = [(upper << 16 | lower) - (HALF - 1) for upper, lower in zip(uppers, lowers, strict=True)]
    ties = [int(counts_H[lower]) for counts_H, lower in zip(lower_counts_KH, lowers, strict=True)]
    return torch.tensor(patterns, dtype=torch.int32).view(torch.float32), wanted, ties


def _patterns(keys_KN: Tensor) -> Tensor:
    """Bit patterns of magnitudes moved up by almost half, so that the upper half of zero is zero's own."""
    return keys_KN.abs().view(torch.int32) + (HALF - 1)


def _find(counts_KH: Tensor, wanted: Sequence[int]) -> tuple[list[int], list[int]]:
    """Per key the half in which the `wanted` largest end, and how many of them are in it."""
    found = [kernels.half_of(counts_H, count) for counts_H, count in zip(counts_KH.numpy(), wanted, strict=True)]
    return [half for half, _ in found], [count for _, count in found]


def _count_lower(keys: Keys, uppers: Sequence[int], block: Block, counts_KH: Tensor) -> None:
    """How many elements in the given upper half have each lower half, [K, H]."""
    keys_KN = keys(block)
    if on_cpu(keys_KN):
        kernels.count_lower_halves(rows(keys_KN).view(np.uint32), np.array(uppers), counts_KH.numpy())
        return
    for counts_H, patterns_N, upper in zip(counts_KH, _patterns(keys_KN), uppers, strict=True):
        inside_N = patterns_N[patterns_N >> 16 == upper] & (HALF - 1)
        counts_H += torch.bincount(inside_N, minlength=HALF).cpu()


def _cut_ties(passes: Passes, keys: Keys, levels_K: Tensor, wanted: Sequence[int]) -> list[Threshold]:
    """Thresholds that take `wanted[k]` of the elements that equal the level."""

    def tied(block: Block) -> tuple[int, list[int]]:
        keys_KN = keys(block)
        if on_cpu(keys_KN):
            counts_K = torch.empty(len(keys_KN), dtype=torch.int64)
            kernels.count_level(rows(keys_KN), levels_K.numpy(), counts_K.numpy())
            return block.position, counts_K.tolist()
        return block.position, (keys_KN.abs() == levels_K[:, None].to(keys_KN)).sum(dim=1).tolist()

    blocks = passes.map(tied)
    return [_cut(level, k, blocks, wanted[k]) for k, level in enumerate(levels_K.tolist())]


def _cut(level: float, key: int, blocks: Sequence[tuple[int, list[int]]], wanted: int) -> Threshold:
    for position, ties in blocks:
        if ties[key] >= wanted:
            return Threshold(level, position, wanted)
        wanted -= int(ties[key])
    return Threshold(level, math.inf, 0)


def trimmer(passes: TensorDeltas | ModelDeltas, densities_J: Tensor) -> Trimmer:
    """Keeps the largest `density` share of every target's deltas (by magnitude, at least one) and zeroes the others.

    Shares are of a tensor or of the model, whichever `passes` are over.
    """
    counts = [max(1, int(density * passes.num_elements)) for density in densities_J.tolist()]
    if min(counts) >= passes.num_elements:
        return lambda block: block.deltas_JN
    selected = largest(passes, count_keys(passes, _deltas, len(counts)), counts)

    def trimmed(block: Block) -> Tensor:
        deltas_JN = block.deltas_JN
        selected.note(block, deltas_JN)
        return selected.keep(block, deltas_JN, deltas_JN, scratch("trimmed", deltas_JN))

    return trimmed


def middle_trimmer(deltas: TensorDeltas, densities_J: Tensor, gammas_J: Tensor) -> Trimmer:
    """Zeroes the `gamma` share of every target's largest deltas, then the smallest, until the `density` share is left.

    Where both are more than everything, fewer of the largest go.
    """
    total = deltas.num_elements
    kept = [int(density * total) for density in densities_J.tolist()]
    tops = [min(int(gamma * total), total - keep) for gamma, keep in zip(gammas_J.tolist(), kept, strict=True)]
    counted = count_keys(deltas, _deltas, deltas.num_targets)
    outer = largest(deltas, counted, tops)
    inner = largest(deltas, counted, [top + keep for top, keep in zip(tops, kept, strict=True)])

    def trimmed(block: Block) -> Tensor:
        deltas_JN = block.deltas_JN
        mask_JN = inner.mask(block, deltas_JN).sub_(outer.mask(block, deltas_JN))
        block.note("selected", lambda: (int(mask_JN.sum()), mask_JN.numel()))
        return mask_JN.mul_(deltas_JN)

    return trimmed


def variance(deltas_JN: Tensor) -> Tensor:
    """Population variance across targets, float32 [N]; exactly zero where all targets are equal.

    Taken from differences to the first target, so that it loses at most a factor J of precision, however large the
    deltas are compared to their spread.
    """
    if on_cpu(deltas_JN):
        variance_N = torch.empty_like(deltas_JN[0])
        kernels.variance(rows(deltas_JN), variance_N.numpy())
        return variance_N
    num_targets = len(deltas_JN)
    sum_N, sum_of_squares_N = torch.zeros_like(deltas_JN[0]), torch.zeros_like(deltas_JN[0])
    for deltas_N in deltas_JN[1:]:
        difference_N = deltas_N - deltas_JN[0]
        sum_N += difference_N
        sum_of_squares_N += difference_N.square_()
    return sum_of_squares_N.div_(num_targets).sub_(sum_N.div_(num_targets).square_())


@dataclass(frozen=True)
class MostVarying:
    """Positions that are selected together, for all targets; `None` selects every position."""

    selected: Selected | None

    def __call__(self, block: Block) -> Tensor:
        """The block's deltas, those that are not selected set to zero, [J, N]."""
        if self.selected is None:
            return block.deltas_JN
        spread_1N = _spread(block)
        self.selected.note(block, spread_1N)
        return self.selected.keep(block, spread_1N, block.deltas_JN, scratch("varying", block.deltas_JN))

    @property
    def is_empty(self) -> bool:
        return self.selected is not None and self.selected.thresholds == (NOTHING,)


def most_varying(passes: TensorDeltas | ModelDeltas, share: float) -> MostVarying:
    """The `share` most varying positions across targets, out of those that vary at all.

    Everything is selected when `share` is 1, and when a single target leaves nothing to compare.
    """
    if share >= 1 or passes.num_targets == 1:
        return MostVarying(None)
    counted = count_keys(passes, _spread, 1)
    return MostVarying(largest(passes, counted, [int(share * counted.num_nonzero[0])]))


def _spread(block: Block) -> Tensor:
    return variance(block.deltas_JN)[None]


def _deltas(block: Block) -> Tensor:
    return block.deltas_JN
