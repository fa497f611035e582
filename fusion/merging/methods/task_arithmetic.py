from fusion.merging.deltas import TensorDeltas
from fusion.merging.method import MergedDelta, merge_method
from fusion.merging.numerics.arithmetic import normalized
from fusion.merging.parameters import Weight, normalizable, per_target


@merge_method(paper="https://arxiv.org/abs/2212.04089", check=normalizable)
def task_arithmetic(deltas: TensorDeltas, *, weight: Weight = 0.3, normalize: bool = False) -> MergedDelta:
    """Sum of task vectors: sum_j w_j d_j; the published FuseChat baseline weighs each target 0.3."""
    weights_J = normalized(per_target(weight, deltas.num_targets), normalize)
    return MergedDelta.weighted(weights_J)
