from torch import Tensor

from fusion.merging.arithmetic import agreed_sum, agreeing
from fusion.merging.dropping import Rescale, drop_and_rescale
from fusion.merging.method import MergedDelta, TensorContext, merge_method
from fusion.merging.parameters import Density, Weight, normalizable, per_target


@merge_method(paper="https://arxiv.org/abs/2311.03099", check=normalizable)
def dare_ties(
    deltas_JN: Tensor,
    *,
    density: Density = 0.6,
    weight: Weight = 0.2,
    normalize: bool = True,
    rescale: Rescale = "density",
    context: TensorContext = TensorContext(),  # noqa: B008 - frozen
) -> MergedDelta:
    """DARE's random dropping in the place of TIES' trimming, then its sign election."""
    weights_J = per_target(weight, len(deltas_JN))
    kept_JN = drop_and_rescale(deltas_JN, per_target(density, len(deltas_JN)), rescale, context)
    agree_JN = agreeing(kept_JN * weights_J[:, None].to(kept_JN.dtype))
    return MergedDelta(agreed_sum(kept_JN, weights_J, agree_JN, renormalize=normalize), weights_J)
