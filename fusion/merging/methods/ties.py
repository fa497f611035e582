from torch import Tensor

from fusion.merging.arithmetic import agreed_sum, agreeing
from fusion.merging.method import MergedDelta, merge_method
from fusion.merging.parameters import Density, Weight, normalizable, per_target
from fusion.merging.selection import trim


@merge_method(paper="https://arxiv.org/abs/2306.01708", check=normalizable)
def ties(deltas_JN: Tensor, *, density: Density = 0.6, weight: Weight = 0.2, normalize: bool = True) -> MergedDelta:
    """TIES: trim each target to its largest deltas per tensor, elect a sign per position, merge those that agree.

    The vote is the sign of the weighted sum. `normalize` divides by the agreeing weights (the disjoint mean).
    """
    weights_J = per_target(weight, len(deltas_JN))
    trimmed_JN = trim(deltas_JN, per_target(density, len(deltas_JN)))
    agree_JN = agreeing(trimmed_JN * weights_J[:, None].to(trimmed_JN.dtype))
    return MergedDelta(agreed_sum(trimmed_JN, weights_J, agree_JN, renormalize=normalize), weights_J)
