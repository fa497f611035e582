"""Which elements take part in a merge: the largest, the most varying. Of equal ones, those of lowest index.

A selection over a whole model takes no more memory than one over a tensor. Shapes: K keys of a block (such as
magnitudes of K targets), N elements of a block, J targets.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fusion.merging.deltas import Block, ModelDeltas, Passes, TensorDeltas
from fusion.merging.numerics import kernels
from fusion.merging.numerics.arithmetic import are_normal, on_cpu, rows, squared_norms
from fusion.merging.numerics.one_pass import Patterns, Span
from fusion.merging.numerics.thresholds import NOTHING, Keys, Threshold, find_thresholds
from fusion.merging.numerics.workspace import scratch

NOTHING_SELECTED = "the targets differ at too few positions: nothing is selected, the base stays"


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

    def bounds(self, block: Span) -> np.ndarray | None:
        """From which magnitude of a key on elements are selected, float32 [K]; None if that changes in the block."""
        rests = [threshold.rest_in(block) for threshold in self.thresholds]
        if any(0 < rest < block.num_elements for rest in rests):
            return None
        levels_K = np.array([threshold.level for threshold in self.thresholds], dtype=np.float32)
        return np.where(rests, levels_K, np.nextafter(levels_K, np.float32(np.inf)))

    def mask(self, block: Block, keys_KN: Tensor) -> Tensor:
        """1.0 where an element of the block is selected, else 0.0, [K, N]."""
        return self.keep(block, keys_KN, torch.ones_like(keys_KN), torch.empty_like(keys_KN))

    def note(self, block: Block, keys_KN: Tensor) -> None:
        block.note("selected", lambda: (int(self.mask(block, keys_KN).sum()), keys_KN.numel()))


def largest(passes: Passes, keys: Keys, counts: Sequence[int]) -> Selected:
    """The `counts[k]` largest elements of each key (all, if there are fewer); of equal ones, those of lowest index.

    With more counts than keys, the keys are taken in turn.
    """
    return Selected(find_thresholds(passes, keys, [partial(_constant, count) for count in counts]))


def largest_share(passes: Passes, key: Keys, share: float) -> Selected:
    """The largest `share` of the elements of one key ([1, N] of a block) that are not zero."""
    return Selected(find_thresholds(passes, key, [lambda num_nonzero: int(share * num_nonzero)]))


def order_statistics(passes: Passes, key: Keys, ranks: Sequence[int]) -> list[float]:
    """The elements of one key ([1, N] of a block) that have the given ranks, 0 for the smallest."""
    selected = largest(passes, key, [passes.num_elements - rank for rank in ranks])
    return [threshold.level for threshold in selected.thresholds]


def _constant(count: int, num_nonzero: int) -> int:
    return count


@dataclass(frozen=True)
class Selection:
    """What a method leaves of the deltas: those whose key is among the largest; all of them with `selected` None."""

    key: Keys
    selected: Selected | None

    def __call__(self, block: Block) -> Tensor:
        """The block's deltas, those that are not selected set to zero, [J, N]."""
        deltas_JN = block.deltas_JN
        if self.selected is None:
            return deltas_JN
        keys_KN = self.key(block)
        self.selected.note(block, keys_KN)
        return self.selected.keep(block, keys_KN, deltas_JN, scratch("selected", deltas_JN))

    def bounds(self, block: Span) -> tuple[np.ndarray, bool] | None:
        """For compiled loops: as `Selected.bounds`, and whether the key is the variance, not the delta itself.

        None if they do not know the key.
        """
        if self.selected is None:
            return np.zeros(1, dtype=np.float32), True
        bounds_K = self.selected.bounds(block) if self.key in (magnitude, spread) else None
        return None if bounds_K is None else (bounds_K, self.key is spread)

    @property
    def is_empty(self) -> bool:
        return self.selected is not None and self.selected.thresholds == (NOTHING,)


@dataclass(frozen=True)
class SelectedSquares:
    """Squared norms of what is selected of the deltas, [J], float64."""

    select: Selection

    def __call__(self, block: Block) -> Tensor:
        return squared_norms(self.select(block))

    def look(self, patterns: Patterns) -> tuple[Tensor, float] | None:
        """As `fusion.merging.numerics.one_pass.OneLook.look`; None where squares under- or overflow, too."""
        bounds = self.select.bounds(patterns.block)
        if bounds is None:
            return None
        kept_J = torch.empty(len(patterns.targets_JN), dtype=torch.float64)
        results = kept_J.numpy(), patterns.squares_J
        base_square = kernels.kept_squares_bfloat16(*patterns.inputs, *bounds, *results)
        return (kept_J, base_square) if are_normal(kept_J) else None


def trimmer(passes: TensorDeltas | ModelDeltas, densities_J: Tensor) -> Selection:
    """Keeps the largest `density` share of every target's deltas (by magnitude, at least one) and zeroes the others.

    Shares are of a tensor or of the model, whichever `passes` are over.
    """
    counts = [max(1, int(density * passes.num_elements)) for density in densities_J.tolist()]
    keeps_all = min(counts) >= passes.num_elements
    return Selection(magnitude, None if keeps_all else largest(passes, magnitude, counts))


def middle_trimmer(deltas: TensorDeltas, densities_J: Tensor, gammas_J: Tensor) -> Callable[[Block], Tensor]:
    """Zeroes the `gamma` share of every target's largest deltas, then the smallest, until the `density` share is left.

    Where both are more than everything, fewer of the largest go.
    """
    total = deltas.num_elements
    kept = [int(density * total) for density in densities_J.tolist()]
    tops = [min(int(gamma * total), total - keep) for gamma, keep in zip(gammas_J.tolist(), kept, strict=True)]
    thresholds = largest(deltas, magnitude, [*tops, *map(sum, zip(tops, kept, strict=True))]).thresholds
    outer, inner = Selected(thresholds[: len(tops)]), Selected(thresholds[len(tops) :])

    def trimmed(block: Block) -> Tensor:
        deltas_JN = block.deltas_JN
        mask_JN = inner.mask(block, deltas_JN).sub_(outer.mask(block, deltas_JN))
        block.note("selected", lambda: (int(mask_JN.sum()), mask_JN.numel()))
        return mask_JN.mul_(deltas_JN)

    return trimmed


def variance(deltas_JN: Tensor) -> Tensor:
    """Population variance across targets, float32 [N]; exactly zero where all targets are equal.

    Taken from differences to the first target, so that it loses at most a factor J of precision, however large the
    deltas are compared to their spread. On a CPU the thread's next call overwrites it.
    """
    if on_cpu(deltas_JN):
        variance_N = scratch("variance", deltas_JN[0])
        kernels.variance(rows(deltas_JN), variance_N.numpy())
        return variance_N
    num_targets = len(deltas_JN)
    sum_N, sum_of_squares_N = torch.zeros_like(deltas_JN[0]), torch.zeros_like(deltas_JN[0])
    for deltas_N in deltas_JN[1:]:
        difference_N = deltas_N - deltas_JN[0]
        sum_N += difference_N
        sum_of_squares_N += difference_N.square_()
    return sum_of_squares_N.div_(num_targets).sub_(sum_N.div_(num_targets).square_())


def most_varying(passes: TensorDeltas | ModelDeltas, share: float) -> Selection:
    """The `share` most varying positions across targets, out of those that vary at all.

    Everything is selected when `share` is 1, and when a single target leaves nothing to compare.
    """
    selects_all = share >= 1 or passes.num_targets == 1
    return Selection(spread, None if selects_all else largest_share(passes, spread, share))


def spread(block: Block) -> Tensor:
    """The variance of each position across targets, [1, N]."""
    return variance(block.deltas_JN)[None]


def magnitude(block: Block) -> Tensor:
    """The deltas, whose magnitudes count, [J, N]."""
    return block.deltas_JN
