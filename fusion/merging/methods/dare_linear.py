from fusion.merging.deltas import TensorDeltas
from fusion.merging.method import MergedDelta, merge_method
from fusion.merging.numerics.arithmetic import normalized, weighted_sum
from fusion.merging.numerics.dropping import Rescale, drop_and_rescale
from fusion.merging.parameters import Density, Weight, normalizable, per_target


@merge_method(paper="https://arxiv.org/abs/2311.03099", check=normalizable)
def dare_linear(
    deltas: TensorDeltas,
    *,
    density: Density = 0.6,
    weight: Weight = 0.2,
    normalize: bool = True,
    rescale: Rescale = "density",
) -> MergedDelta:
    """DARE: drop deltas at random, rescale the rest to the same expected value, and sum them by weight."""
    kept = drop_and_rescale(deltas, per_target(density, deltas.num_targets), rescale)
    weights_J = normalized(per_target(weight, deltas.num_targets), normalize)
    return MergedDelta(lambda block: weighted_sum(kept(block), weights_J), weights_J)
