"""Shares of targets by their squared gradients, position by position. Shapes: J targets, N elements of a block."""

import torch
from torch import Tensor

from fusion.merging.deltas import Block, ModelDeltas, TensorDeltas
from fusion.merging.method import MergedDelta
from fusion.merging.numerics.arithmetic import sum_over_targets

UNSEEN = "no squared gradients of this tensor: the average by weight"


def fisher_shares(fisher_JN: Tensor, factors_J: Tensor, otherwise_J: Tensor) -> tuple[Tensor, Tensor]:
    """f_j F_j / sum_i f_i F_i, float64 [J, N]; and where all F are zero, [N], so that the shares are `otherwise_J`."""
    scaled_JN = fisher_JN.double() * factors_J[:, None].to(fisher_JN.device)
    total_N = sum_over_targets(scaled_JN)
    unseen_N = total_N == 0
    return torch.where(unseen_N, otherwise_J[:, None].to(total_N), scaled_JN / total_N), unseen_N


def inverse_means(totals_J: Tensor, num_elements: int) -> Tensor:
    """Of squared gradients that sum to these totals, [J]; 1 where all of a target's are zero."""
    means_J = totals_J / num_elements
    return torch.where(means_J > 0, means_J, 1.0).reciprocal()


def survey_of_means(model: ModelDeltas, parameters: object) -> Tensor:
    """`inverse_means` of the targets over the whole model, [J]: for a method's `survey`."""
    return inverse_means(torch.stack(list(model.per_tensor(_total).values())).sum(dim=0), model.num_elements)


def _total(deltas: TensorDeltas) -> Tensor:
    """Sum of a tensor's squared gradients, float64 [J]; the deltas themselves are not read."""
    evidence = deltas.evidence
    if not evidence:
        return torch.zeros(deltas.num_targets, dtype=torch.float64)
    return torch.stack([one.sum(dtype=torch.float64) for one in evidence.whole(deltas.shape)])


def fisher_sum(deltas: TensorDeltas, weights_J: Tensor, factors_J: Tensor, coefficients_J: Tensor) -> MergedDelta:
    """sum_j c_j s_j d_j, s_j the shares by w_j f_j F_j; the weights themselves where no target has any F."""
    evidence = deltas.evidence
    if not evidence:
        return MergedDelta.weighted(coefficients_J * weights_J, (UNSEEN,))
    evidence.require(deltas.shape)

    def weights(block: Block) -> Tensor:
        """float64 [J, N]."""
        shares_JN, unseen_N = fisher_shares(evidence.block(block), weights_J * factors_J, weights_J)
        block.note("unseen", lambda: (int(torch.count_nonzero(unseen_N)), block.num_elements))
        return shares_JN * coefficients_J[:, None].to(shares_JN)

    def merged(block: Block) -> Tensor:
        return sum_over_targets(weights(block) * block.deltas_JN).float()

    mean_J = deltas.reduce(lambda block: weights(block).sum(dim=1).cpu()) / deltas.num_elements
    return MergedDelta(merged, mean_J)
