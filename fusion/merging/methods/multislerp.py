import torch
from torch import Tensor

from fusion.merging.deltas import TensorDeltas
from fusion.merging.method import MergedDelta, merge_method
from fusion.merging.numerics.arithmetic import normalized
from fusion.merging.numerics.directions import Directions, on_directions
from fusion.merging.parameters import Importances, importances, per_target

OPPOSED = 1e-8


@merge_method(paper="https://goddard.blog/posts/multislerp-wow-what-a-cool-idea", needs_base=False, check=importances)
def multislerp(deltas: TensorDeltas, *, weight: Importances = 1.0) -> MergedDelta:
    """Mean direction times mean length: sum_j w_j ||d_j|| * m / ||m|| with m = sum_j w_j d_j / ||d_j||, sum_j w_j = 1.

    The published procedure goes on from there by one step in the tangent space of m, but the weighted directions add
    up to nothing in it: that step has length zero. Directions that cancel out are averaged as they are.
    """
    weights_J = normalized(per_target(weight, deltas.num_targets), True)

    def coefficients(found: Directions) -> Tensor:
        pull = (weights_J @ found.cosines_JJ @ weights_J).clamp(min=0).sqrt()
        if pull < OPPOSED:
            return weights_J
        return torch.dot(weights_J, found.norms_J) / pull * weights_J * found.inverse_norms_J

    return on_directions(deltas, coefficients)
