from fusion.merging.deltas import TensorDeltas
from fusion.merging.method import MergedDelta, merge_method
from fusion.merging.numerics.dropping import Rescale, drop_and_rescale
from fusion.merging.numerics.election import Election
from fusion.merging.parameters import Density, Weight, normalizable, per_target


@merge_method(paper="https://arxiv.org/abs/2311.03099", check=normalizable)
def dare_ties(
    deltas: TensorDeltas,
    *,
    density: Density = 0.6,
    weight: Weight = 0.2,
    normalize: bool = True,
    rescale: Rescale = "density",
) -> MergedDelta:
    """DARE's random dropping in the place of TIES' trimming, then its sign election."""
    weights_J = per_target(weight, deltas.num_targets)
    kept = drop_and_rescale(deltas, per_target(density, deltas.num_targets), rescale)
    return MergedDelta(Election(kept, weights_J, normalize, votes_J=weights_J), weights_J)
