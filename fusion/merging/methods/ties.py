from typing import Any, Literal

from fusion.merging.deltas import ModelDeltas, TensorDeltas
from fusion.merging.method import MergedDelta, merge_method
from fusion.merging.numerics.election import Election
from fusion.merging.numerics.selection import Selection, trimmer
from fusion.merging.parameters import Density, Weight, normalizable, per_target


def _model_trimmer(model: ModelDeltas, parameters: Any) -> Selection | None:
    if parameters["trim"] == "tensor":
        return None
    return trimmer(model, per_target(parameters["density"], model.num_targets))


def _model_wide(parameters: Any) -> list[str]:
    return ["density"] if parameters["trim"] == "model" else []


@merge_method(
    paper="https://arxiv.org/abs/2306.01708", check=normalizable, survey=_model_trimmer, model_wide=_model_wide
)
def ties(
    deltas: TensorDeltas,
    *,
    density: Density = 0.6,
    weight: Weight = 0.2,
    normalize: bool = True,
    trim: Literal["tensor", "model"] = "tensor",
) -> MergedDelta:
    """TIES: trim each target to its largest deltas, elect a sign per position, merge those that agree.

    The vote is the sign of the weighted sum. `normalize` divides by the agreeing weights (the disjoint mean). The
    largest deltas are those of each tensor (the share of all tensors is the same), or those of the whole model.
    """
    weights_J = per_target(weight, deltas.num_targets)
    trimmed = deltas.survey if trim == "model" else trimmer(deltas, per_target(density, deltas.num_targets))
    return MergedDelta(Election(trimmed, weights_J, normalize, votes_J=weights_J), weights_J)
