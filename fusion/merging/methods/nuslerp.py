from fusion.merging.deltas import TensorDeltas
from fusion.merging.method import MergedDelta, merge_method
from fusion.merging.methods.slerp import arc
from fusion.merging.numerics.directions import Unit, on_directions
from fusion.merging.parameters import Importances, importances, per_target

ALMOST_PARALLEL = 1 - 1e-15


@merge_method(paper="https://doi.org/10.1145/325165.325242", needs_base=False, num_targets=2, check=importances)
def nuslerp(deltas: TensorDeltas, *, weight: Importances = 1.0, unit: Unit = "tensor") -> MergedDelta:
    """Spherical interpolation of two targets' deltas (of their weights, when there is no base), by weights.

    t = w_2 / (w_1 + w_2) is the share of the way from the first to the second; the angle is that of whole tensors, or
    of every row. The name is mergekit's (https://github.com/arcee-ai/mergekit).
    """
    first, second = per_target(weight, 2).tolist()
    return on_directions(deltas, lambda found: arc(found, second / (first + second), ALMOST_PARALLEL), unit)
