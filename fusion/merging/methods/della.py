from fusion.merging.deltas import TensorDeltas
from fusion.merging.method import MergedDelta, merge_method
from fusion.merging.numerics.dropping import Rescale, drop_by_rank
from fusion.merging.numerics.election import Election
from fusion.merging.parameters import Density, Share, Weight, per_target, rankable


@merge_method(paper="https://arxiv.org/abs/2406.11617", check=rankable)
def della(
    deltas: TensorDeltas,
    *,
    density: Density = 0.6,
    epsilon: Share = 0.15,
    weight: Weight = 0.2,
    normalize: bool = True,
    rescale: Rescale = "density",
) -> MergedDelta:
    """DELLA: drop deltas at random, the smaller ones of a row more often, then TIES' sign election.

    An element is kept with a probability from density - epsilon (the smallest of its row) to density + epsilon (the
    largest), linear in its rank.
    """
    weights_J = per_target(weight, deltas.num_targets)
    kept = drop_by_rank(deltas, per_target(density, deltas.num_targets), epsilon, rescale)
    return MergedDelta(Election(kept, weights_J, normalize, votes_J=weights_J), weights_J)
