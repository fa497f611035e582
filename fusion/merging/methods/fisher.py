from typing import Any

import torch
from torch import Tensor

from fusion.merging.deltas import ModelDeltas, TensorDeltas
from fusion.merging.measuring.fisher import squared_gradients
from fusion.merging.method import MergedDelta, merge_method
from fusion.merging.numerics.arithmetic import normalized
from fusion.merging.numerics.fisher_shares import fisher_sum, survey_of_means
from fusion.merging.parameters import Importances, importances, per_target


def _factors(model: ModelDeltas, parameters: Any) -> Tensor:
    """What each target's squared gradients are multiplied with, [J]."""
    if parameters["normalize"]:
        return survey_of_means(model, parameters)
    return torch.ones(model.num_targets, dtype=torch.float64)


@merge_method(
    paper="https://arxiv.org/abs/2111.09832",
    needs_base=False,
    evidence=squared_gradients,
    survey=_factors,
    check=importances,
)
def fisher(deltas: TensorDeltas, *, weight: Importances = 1.0, normalize: bool = True) -> MergedDelta:
    """Fisher merging: per position, the average weighted by w_j F_j, F_j the target's mean squared gradient.

    The merged delta is sum_j w_j F_j d_j / sum_j w_j F_j. `normalize` divides each target's F by its mean over the
    whole model, so that a target is not heard more because its losses are larger. Where all F are zero, such as for
    embeddings of tokens that no dialogue has, the targets are averaged by w. Coefficients are means over positions.
    """
    weights_J = normalized(per_target(weight, deltas.num_targets), True)
    return fisher_sum(deltas, weights_J, deltas.survey, torch.ones_like(weights_J))
