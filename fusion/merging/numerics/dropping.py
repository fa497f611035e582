"""Random dropping of deltas: DARE's (https://arxiv.org/abs/2311.03099), every element with the same probability, and
DELLA's (https://arxiv.org/abs/2406.11617), by rank. Shapes: J targets, N elements of one block, R rows of C.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from fusion.merging.deltas import Block, TensorDeltas
from fusion.merging.numerics.random_mask import random_shares, write_kept
from fusion.merging.numerics.ranking import relative_ranks
from fusion.merging.numerics.workspace import scratch

Rescale = Literal["density", "l1"]
Dropped = Callable[[Block], Tensor]
"""The deltas of a block, those that are dropped set to zero, float32 [J, N]."""
SMALLEST_L1 = 1e-7


def drop_and_rescale(deltas: TensorDeltas, densities_J: Tensor, rescale: Rescale) -> Dropped:
    """Each delta kept with probability `density`, else zero.

    `rescale="density"` divides the rest by the density (the paper), so that every element keeps its expected value;
    `"l1"` multiplies it so that each target's tensor keeps its L1 norm (nothing happens to norms below 1e-7).
    """

    densities = densities_J.tolist()
    divisors = densities if rescale == "density" else [1.0] * len(densities)

    def kept(block: Block) -> Tensor:
        kept_JN = scratch("kept", block.deltas_JN)
        for target, (density, divisor) in enumerate(zip(densities, divisors, strict=True)):
            write_kept(
                block.deltas_JN[target],
                density,
                divisor,
                kept_JN[target],
                key=(deltas.seed, target, deltas.name),
                start=block.start,
            )
        return kept_JN

    return _with_l1_of(deltas, kept) if rescale == "l1" else kept


def drop_by_rank(deltas: TensorDeltas, densities_J: Tensor, epsilon: float, rescale: Rescale) -> Dropped:
    """Each delta kept with a probability that rises with its rank in its row, density - epsilon to density + epsilon.

    A density of 1 keeps everything, and a vector is one row. `rescale` as in `drop_and_rescale`, where "density"
    divides every element by its own probability.
    """
    ranks = relative_ranks(deltas)

    def chances(block: Block) -> Tensor:
        widths_J = torch.where(densities_J < 1, epsilon, 0.0)
        ranks_JN = ranks(block)
        return (densities_J - widths_J)[:, None].to(ranks_JN) + 2 * widths_J[:, None].to(ranks_JN) * ranks_JN

    def kept(block: Block, chances_JN: Tensor) -> Tensor:
        keep_JN = torch.empty_like(block.deltas_JN)
        for target, chances_N in enumerate(chances_JN):
            shares_N = random_shares(block.num_elements, (deltas.seed, target, deltas.name), block.start)
            keep_JN[target] = shares_N.to(chances_N) < chances_N
        return keep_JN.mul_(block.deltas_JN)

    def scaled(block: Block) -> Tensor:
        chances_JN = chances(block)
        return kept(block, chances_JN).div_(chances_JN)

    return scaled if rescale == "density" else _with_l1_of(deltas, lambda block: kept(block, chances(block)))


def _with_l1_of(deltas: TensorDeltas, kept: Dropped) -> Dropped:
    """`kept`, multiplied so that each target's tensor has the L1 norm that it had before."""
    before_J, after_J = deltas.reduce(lambda block: torch.stack([_l1(block.deltas_JN), _l1(kept(block))]))
    measurable_J = (before_J >= SMALLEST_L1) & (after_J >= SMALLEST_L1)
    factors_J1 = torch.where(measurable_J, before_J / after_J, 1.0)[:, None]
    return lambda block: kept(block).mul_(factors_J1.to(block.deltas_JN))


def _l1(values_JN: Tensor) -> Tensor:
    return torch.linalg.vector_norm(values_JN, ord=1, dim=1, dtype=torch.float64).cpu()
