from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from fusion.merging.deltas import TensorDeltas
from fusion.merging.method import MergedDelta, merge_method
from fusion.merging.numerics.directions import Directions, Unit, on_directions

LEAST_PRODUCT = 1e-6
OPPOSED = "the targets point apart on average: the merged delta points away from their mean"


@merge_method(paper="https://arxiv.org/abs/2403.19522")
def model_stock(
    deltas: TensorDeltas, *, unit: Unit = "tensor", compat: Literal["none", "mergekit"] = "none"
) -> MergedDelta:
    """Model Stock: t * mean_j d_j with t = J cos / (1 + (J - 1) cos), cos the mean over pairs of targets.

    Targets that agree in direction are averaged whole; orthogonal ones are taken for noise, and the base stays. The
    angles are those of whole tensors, or of every row. A single target is kept whole. A mean cosine below 0, for which
    the paper has no case, gives a negative t, as the formula says, and an event. `compat="mergekit"` (0.1.5) takes
    products of two lengths below 1e-6 for 1e-6, which makes short deltas, such as those of norms, look orthogonal.
    """
    num_targets = deltas.num_targets

    def coefficients(found: Directions) -> Tensor:
        if compat == "mergekit":
            found = found.with_least_product(LEAST_PRODUCT)
        cosine = found.mean_cosine if num_targets > 1 else torch.ones_like(found.norms_J[..., 0])
        divisor = 1 + (num_targets - 1) * cosine
        ratio = torch.where(divisor.abs() > 1e-6, num_targets * cosine / divisor, 0.0)
        return (ratio / num_targets)[..., None].expand(found.norms_J.shape)

    merged = on_directions(deltas, coefficients, unit)
    if bool((merged.coefficients < 0).any()):
        return replace(merged, events=(*merged.events, OPPOSED))
    return merged
