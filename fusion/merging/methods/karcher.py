from typing import Annotated

import torch
from torch import Tensor

from fusion.merging.deltas import TensorDeltas
from fusion.merging.method import MergedDelta, merge_method
from fusion.merging.numerics.arithmetic import normalized
from fusion.merging.numerics.directions import Directions, on_directions
from fusion.merging.parameters import Between, Importances, importances, per_target

OPPOSED = 1e-12


@merge_method(paper="https://doi.org/10.1002/cpa.3160300502", needs_base=False, operands="weights", check=importances)
def karcher(
    weights: TensorDeltas,
    *,
    weight: Importances = 1.0,
    max_iterations: Annotated[int, Between(1, 1000)] = 10,
    tolerance: Annotated[float, Between(0, 1)] = 1e-5,
) -> MergedDelta:
    """Karcher mean of the targets' weights: the direction with the smallest sum of squared angles to theirs, times
    their mean length.

    It is found by steps along the mean tangent, u <- exp_u(sum_j w_j log_u(u_j)), until one is shorter than
    `tolerance` radians. Targets of length zero have no direction.
    """
    importance_J = per_target(weight, weights.num_targets)

    def coefficients(found: Directions) -> Tensor:
        shares_J = importance_J * (found.norms_J > 0)
        if shares_J.sum() == 0:
            return torch.zeros_like(shares_J)
        shares_J = normalized(shares_J, True)
        length = torch.dot(normalized(importance_J, True), found.norms_J)
        return length * _mean_direction(found, shares_J, max_iterations, tolerance) * found.inverse_norms_J

    return on_directions(weights, coefficients)


def _mean_direction(found: Directions, shares_J: Tensor, max_iterations: int, tolerance: float) -> Tensor:
    """The mean as a combination [J] of the targets' directions."""
    cosines_JJ = found.cosines_JJ
    mean_J = shares_J
    if _length(mean_J, cosines_JJ) < OPPOSED:  # they cancel out: begin at one of them
        mean_J = torch.eye(len(shares_J), dtype=torch.float64)[int(shares_J.argmax())]
    mean_J = mean_J / _length(mean_J, cosines_JJ)
    for _ in range(max_iterations):
        to_mean_J = (cosines_JJ @ mean_J).clamp(-1, 1)
        pulls_J = shares_J / torch.sinc(to_mean_J.acos() / torch.pi).clamp(min=OPPOSED)
        tangent_J = pulls_J - torch.dot(pulls_J, to_mean_J) * mean_J
        step = _length(tangent_J, cosines_JJ)
        if step < tolerance:
            break
        mean_J = step.cos() * mean_J + step.sin() / step * tangent_J
        mean_J = mean_J / _length(mean_J, cosines_JJ)
    return mean_J


def _length(combination_J: Tensor, cosines_JJ: Tensor) -> Tensor:
    return (combination_J @ cosines_JJ @ combination_J).clamp(min=0).sqrt()
