"""DARE's random drop and rescale (https://arxiv.org/abs/2311.03099). Shapes: J targets, N elements of one tensor."""

from typing import Literal

import torch
from torch import Tensor

from fusion.merging.method import TensorContext
from fusion.merging.random_mask import random_keep

Rescale = Literal["density", "l1"]
SMALLEST_L1 = 1e-7


def drop_and_rescale(deltas_JN: Tensor, densities_J: Tensor, rescale: Rescale, context: TensorContext) -> Tensor:
    """Each delta kept with probability `density`, else zero, float32 [J, N].

    `rescale="density"` divides the rest by the density (the paper), so that every element keeps its expected value;
    `"l1"` multiplies it so that each target's tensor keeps its L1 norm (nothing happens to norms below 1e-7).
    """
    num_elements = deltas_JN.shape[1]
    kept_JN = torch.empty_like(deltas_JN)
    for target, (deltas_N, density) in enumerate(zip(deltas_JN, densities_J.tolist(), strict=True)):
        keep_N = random_keep(density, num_elements, seed=context.seed, target=target, name=context.name)
        kept_JN[target] = deltas_N * keep_N
    if rescale == "density":
        return kept_JN / densities_J[:, None].to(kept_JN.dtype)
    before_J, after_J = (torch.linalg.vector_norm(x, ord=1, dim=1, dtype=torch.float64) for x in (deltas_JN, kept_JN))
    measurable_J = (before_J >= SMALLEST_L1) & (after_J >= SMALLEST_L1)
    factors_J = torch.where(measurable_J, before_J / after_J, 1.0)
    return kept_JN * factors_J[:, None].to(kept_JN.dtype)
