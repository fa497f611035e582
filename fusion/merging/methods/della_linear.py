from fusion.merging.deltas import TensorDeltas
from fusion.merging.method import MergedDelta, merge_method
from fusion.merging.numerics.arithmetic import normalized, weighted_sum
from fusion.merging.numerics.dropping import Rescale, drop_by_rank
from fusion.merging.parameters import Density, Share, Weight, per_target, rankable


@merge_method(paper="https://arxiv.org/abs/2406.11617", check=rankable)
def della_linear(
    deltas: TensorDeltas,
    *,
    density: Density = 0.6,
    epsilon: Share = 0.15,
    weight: Weight = 0.2,
    normalize: bool = False,
    rescale: Rescale = "density",
) -> MergedDelta:
    """DELLA's dropping by rank (see `della`), and a sum by weight without an election."""
    weights_J = normalized(per_target(weight, deltas.num_targets), normalize)
    kept = drop_by_rank(deltas, per_target(density, deltas.num_targets), epsilon, rescale)
    return MergedDelta(lambda block: weighted_sum(kept(block), weights_J), weights_J)
