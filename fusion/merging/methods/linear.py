from fusion.merging.deltas import TensorDeltas
from fusion.merging.method import MergedDelta, merge_method
from fusion.merging.numerics.arithmetic import normalized
from fusion.merging.parameters import Weight, normalizable, per_target


@merge_method(paper="https://arxiv.org/abs/2203.05482", needs_base=False, check=normalizable)
def linear(deltas: TensorDeltas, *, weight: Weight = 1.0, normalize: bool = True) -> MergedDelta:
    """Weighted average of the targets (model soup): sum_j w_j d_j, the weights divided by their sum by default."""
    weights_J = normalized(per_target(weight, deltas.num_targets), normalize)
    return MergedDelta.weighted(weights_J)
