from torch import Tensor

from fusion.merging.arithmetic import normalized, weighted_sum
from fusion.merging.dropping import Rescale, drop_and_rescale
from fusion.merging.method import MergedDelta, TensorContext, merge_method
from fusion.merging.parameters import Density, Weight, normalizable, per_target


@merge_method(paper="https://arxiv.org/abs/2311.03099", check=normalizable)
def dare_linear(
    deltas_JN: Tensor,
    *,
    density: Density = 0.6,
    weight: Weight = 0.2,
    normalize: bool = True,
    rescale: Rescale = "density",
    context: TensorContext = TensorContext(),  # noqa: B008 - frozen
) -> MergedDelta:
    """DARE: drop deltas at random, rescale the rest to the same expected value, and sum them by weight."""
    kept_JN = drop_and_rescale(deltas_JN, per_target(density, len(deltas_JN)), rescale, context)
    weights_J = normalized(per_target(weight, len(deltas_JN)), normalize)
    return MergedDelta(weighted_sum(kept_JN, weights_J), weights_J)
