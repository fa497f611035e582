from fusion.merging.deltas import TensorDeltas
from fusion.merging.method import MergedDelta, merge_method
from fusion.merging.numerics.election import Election
from fusion.merging.numerics.selection import middle_trimmer
from fusion.merging.parameters import Density, Shares, Weight, normalizable, per_target


@merge_method(paper="https://arxiv.org/abs/2312.06795", check=normalizable)
def breadcrumbs_ties(
    deltas: TensorDeltas,
    *,
    density: Density = 0.9,
    gamma: Shares = 0.01,
    weight: Weight = 0.3,
    normalize: bool = False,
) -> MergedDelta:
    """Model Breadcrumbs' trimming at both ends, then TIES' sign election."""
    num_targets = deltas.num_targets
    trimmed = middle_trimmer(deltas, per_target(density, num_targets), per_target(gamma, num_targets))
    weights_J = per_target(weight, num_targets)
    return MergedDelta(Election(trimmed, weights_J, normalize, votes_J=weights_J), weights_J)
