"""Which elements of a tensor take part in a merge: the largest, the most varying. Shapes: J targets, N elements."""

import numpy as np
import torch
from torch import Tensor

NOTHING_SELECTED = "the targets differ at too few positions: nothing is selected, the base stays"


def keep_largest(values_N: Tensor, count: int) -> Tensor:
    """Bool mask [N] of the `count` largest values; of equal ones, those with the lowest index."""
    if count >= values_N.numel():
        return torch.ones_like(values_N, dtype=torch.bool)
    if count <= 0:
        return torch.zeros_like(values_N, dtype=torch.bool)
    rank = values_N.numel() - count
    threshold = float(np.partition(values_N.numpy(), rank)[rank])
    keep_N = values_N > threshold
    ties = torch.nonzero(values_N == threshold).flatten()
    keep_N[ties[: count - int(keep_N.sum())]] = True
    return keep_N


def trim(deltas_JN: Tensor, densities_J: Tensor) -> Tensor:
    """Every target's deltas with all but its largest `density` share (by magnitude, at least one) set to zero."""
    num_elements = deltas_JN.shape[1]
    keep_JN = torch.stack(
        [
            keep_largest(deltas_N.abs(), max(1, int(density * num_elements)))
            for deltas_N, density in zip(deltas_JN, densities_J.tolist(), strict=True)
        ]
    )
    return deltas_JN * keep_JN


def variance(deltas_JN: Tensor) -> Tensor:
    """Population variance across targets, float32 [N]; exactly zero where all targets are equal.

    Taken from differences to the first target, so that it loses at most a factor J of precision, however large the
    deltas are compared to their spread.
    """
    num_targets = len(deltas_JN)
    sum_N, sum_of_squares_N = torch.zeros_like(deltas_JN[0]), torch.zeros_like(deltas_JN[0])
    for deltas_N in deltas_JN[1:]:
        difference_N = deltas_N - deltas_JN[0]
        sum_N += difference_N
        sum_of_squares_N += difference_N.square()
    return sum_of_squares_N / num_targets - (sum_N / num_targets).square()


def most_varying(deltas_JN: Tensor, share: float) -> Tensor:
    """Bool mask [N] of the `share` most varying positions across targets, out of those that vary at all.

    Everything is selected when `share` is 1, and when a single target leaves nothing to compare.
    """
    if share >= 1 or len(deltas_JN) == 1:
        return torch.ones_like(deltas_JN[0], dtype=torch.bool)
    variance_N = variance(deltas_JN)
    return keep_largest(variance_N, int(share * int(torch.count_nonzero(variance_N))))
