"""The election of signs: per position the majority's sign, and the sum of the deltas that have it.

TIES (https://arxiv.org/abs/2306.01708) and SCE (https://arxiv.org/abs/2408.07990) differ in what takes part, in who
votes with which weight, and in what is summed. Shapes: J targets, N elements of a block.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fusion.merging.deltas import Block
from fusion.merging.numerics import kernels
from fusion.merging.numerics.arithmetic import on_cpu, rows, sum_over_targets, weighted_sum, wide
from fusion.merging.numerics.one_pass import Patterns
from fusion.merging.numerics.selection import Selection


@dataclass(frozen=True)
class Election:
    """sum_j w_j d_j over the targets whose w_j d_j has the majority's sign, of what `select` leaves of the deltas.

    `votes_J`: what each target's delta counts in the sum whose sign is the majority's; 1 without. `renormalize`
    divides per position by the sum of the agreeing weights; a divisor of zero counts as 1, and one below
    `least_divisor` as that. Zeros agree with nobody. The share of erased entries goes to the notes of a block.
    """

    select: Callable[[Block], Tensor]
    weights_J: Tensor
    renormalize: bool
    votes_J: Tensor | None = None
    least_divisor: float = 0.0

    def __call__(self, block: Block) -> Tensor:
        deltas_JN = self.select(block)
        signs_N = majority(deltas_JN, self.votes_J)
        block.note("erased", lambda: _erased(deltas_JN, self.weights_J, signs_N))
        return agreed_sum(
            deltas_JN, self.weights_J, signs_N, renormalize=self.renormalize, least_divisor=self.least_divisor
        )

    def merge(self, patterns: Patterns, scale: float, rounded_N: np.ndarray) -> tuple[float, bool] | None:
        """As `fusion.merging.numerics.one_pass.OnePass.merge`; None where a selection ends within the block."""
        bounds = self.select.bounds(patterns.block) if isinstance(self.select, Selection) else None
        if bounds is None:
            return None
        votes_J = torch.ones(len(self.weights_J)) if self.votes_J is None else self.votes_J
        weights = wide(votes_J), wide(self.weights_J)
        divisor = self.renormalize, float(self.least_divisor)
        return kernels.elect_bfloat16(
            *patterns.inputs, *bounds, *weights, *divisor, scale, rounded_N, patterns.squares_J
        )


def majority(votes_JN: Tensor, weights_J: Tensor | None = None) -> Tensor:
    """The sign of the (weighted) sum over targets, zero counting as plus: 1.0 or -1.0, [N]."""
    total_N = weighted_sum(votes_JN, torch.ones(len(votes_JN)) if weights_J is None else weights_J)
    return torch.ge(total_N, 0, out=total_N).mul_(2).sub_(1)


def agreed_sum(
    deltas_JN: Tensor,
    weights_J: Tensor,
    signs_N: Tensor,
    *,
    renormalize: bool,
    least_divisor: float = 0.0,
) -> Tensor:
    """sum_j w_j d_j over the targets whose w_j d_j has the sign of `signs_N`, [N]; see `Election`."""
    if on_cpu(deltas_JN):
        total_N = torch.empty_like(signs_N)
        options = renormalize, float(least_divisor)
        kernels.agreed_sum(rows(deltas_JN), wide(weights_J), signs_N.numpy(), *options, total_N.numpy())
        return total_N
    agreeing_JN = _agreeing(deltas_JN, weights_J, signs_N)
    total_N = sum_over_targets(agreeing_JN).mul_(signs_N)
    if not renormalize:
        return total_N
    divisor_N = weighted_sum(agreeing_JN.sign_(), weights_J)
    if least_divisor:
        return total_N.div_(divisor_N.clamp_(min=least_divisor))
    divisor_N += torch.eq(divisor_N, 0, out=torch.empty_like(divisor_N))
    return total_N.div_(divisor_N)


def _agreeing(deltas_JN: Tensor, weights_J: Tensor, signs_N: Tensor) -> Tensor:
    """|w_j d_j| where it has the majority's sign, else zero, [J, N]."""
    agreeing_JN = deltas_JN * weights_J[:, None].to(deltas_JN)
    agreeing_JN *= signs_N
    return agreeing_JN.clamp_(min=0)


def _erased(deltas_JN: Tensor, weights_J: Tensor, signs_N: Tensor) -> tuple[int, int]:
    """How many of the deltas that are not zero do not agree, and how many there are."""
    if on_cpu(deltas_JN):
        return kernels.count_erased(rows(deltas_JN), wide(weights_J), signs_N.numpy())
    num_deltas = int(torch.count_nonzero(deltas_JN))
    return num_deltas - int(torch.count_nonzero(_agreeing(deltas_JN, weights_J, signs_N))), num_deltas
