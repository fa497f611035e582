from typing import Any

import torch
from torch import Tensor

from fusion.merging.arithmetic import normalized, sum_over_targets
from fusion.merging.deltas import Block, ModelDeltas, TensorDeltas
from fusion.merging.measuring.fisher import squared_gradients
from fusion.merging.method import MergedDelta, merge_method
from fusion.merging.parameters import Importances, importances, per_target

UNSEEN = "no squared gradients of this tensor: the average by weight"


def _total(deltas: TensorDeltas) -> Tensor:
    """Sum of a tensor's squared gradients, float64 [J]; the deltas themselves are not read."""
    evidence = deltas.evidence
    if not evidence:
        return torch.zeros(deltas.num_targets, dtype=torch.float64)
    return torch.stack([one.sum(dtype=torch.float64) for one in evidence.whole(deltas.shape)])


def _means(model: ModelDeltas, parameters: Any) -> Tensor | None:
    """Mean squared gradient of each target over the whole model, [J]; 1 where all are zero."""
    if not parameters["normalize"]:
        return None
    means_J = torch.stack(list(model.per_tensor(_total).values())).sum(dim=0) / model.num_elements
    return torch.where(means_J > 0, means_J, 1.0)


@merge_method(
    paper="https://arxiv.org/abs/2111.09832",
    needs_base=False,
    evidence=squared_gradients,
    survey=_means,
    check=importances,
)
def fisher(deltas: TensorDeltas, *, weight: Importances = 1.0, normalize: bool = True) -> MergedDelta:
    """Fisher merging: per position, the average weighted by w_j F_j, F_j the target's mean squared gradient.

    The merged delta is sum_j w_j F_j d_j / sum_j w_j F_j. `normalize` divides each target's F by its mean over the
    whole model, so that a target is not heard more because its losses are larger. Where all F are zero, such as for
    embeddings of tokens that no dialogue has, the targets are averaged by w. Coefficients are means over positions.
    """
    weights_J = normalized(per_target(weight, deltas.num_targets), True)
    evidence = deltas.evidence
    if not evidence:
        return MergedDelta.weighted(weights_J, (UNSEEN,))
    evidence.require(deltas.shape)
    factors_J = weights_J if deltas.survey is None else weights_J / deltas.survey

    def shares(block: Block) -> Tensor:
        """float64 [J, N]: columns sum to 1."""
        fisher_JN = evidence.block(block).double() * factors_J[:, None].to(block.deltas_JN.device)
        total_N = sum_over_targets(fisher_JN)
        unseen_N = total_N == 0
        block.note("unseen", lambda: (int(torch.count_nonzero(unseen_N)), block.num_elements))
        return torch.where(unseen_N, weights_J[:, None].to(total_N), fisher_JN / total_N)

    def merged(block: Block) -> Tensor:
        return sum_over_targets(shares(block) * block.deltas_JN).float()

    mean_J = deltas.reduce(lambda block: shares(block).sum(dim=1).cpu()) / deltas.num_elements
    return MergedDelta(merged, mean_J)
