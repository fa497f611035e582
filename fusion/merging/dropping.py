"""DARE's random drop and rescale (https://arxiv.org/abs/2311.03099). Shapes: J targets, N elements of one block."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from fusion.merging.deltas import Block, TensorDeltas
from fusion.merging.random_mask import random_keep

Rescale = Literal["density", "l1"]
SMALLEST_L1 = 1e-7


def drop_and_rescale(deltas: TensorDeltas, densities_J: Tensor, rescale: Rescale) -> Callable[[Block], Tensor]:
    """Each delta kept with probability `density`, else zero. Returns a function of blocks, float32 [J, N].

    `rescale="density"` divides the rest by the density (the paper), so that every element keeps its expected value;
    `"l1"` multiplies it so that each target's tensor keeps its L1 norm (nothing happens to norms below 1e-7).
    """

    def kept(block: Block) -> Tensor:
        keep_JN = torch.empty_like(block.deltas_JN)
        for target, density in enumerate(densities_J.tolist()):
            keep_JN[target] = random_keep(
                density, block.num_elements, seed=deltas.seed, target=target, name=deltas.name, start=block.start
            )
        return keep_JN.mul_(block.deltas_JN)

    if rescale == "density":
        divisors_J1 = densities_J[:, None]
        return lambda block: kept(block).div_(divisors_J1.to(block.deltas_JN))
    before_J, after_J = deltas.reduce(lambda block: torch.stack([_l1(block.deltas_JN), _l1(kept(block))]))
    measurable_J = (before_J >= SMALLEST_L1) & (after_J >= SMALLEST_L1)
    factors_J1 = torch.where(measurable_J, before_J / after_J, 1.0)[:, None]
    return lambda block: kept(block).mul_(factors_J1.to(block.deltas_JN))


def _l1(values_JN: Tensor) -> Tensor:
    return torch.linalg.vector_norm(values_JN, ord=1, dim=1, dtype=torch.float64).cpu()
