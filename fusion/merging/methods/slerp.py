import torch
from torch import Tensor

from fusion.merging.deltas import TensorDeltas
from fusion.merging.method import MergedDelta, merge_method
from fusion.merging.numerics.directions import Directions, on_directions
from fusion.merging.parameters import Share

ALMOST_PARALLEL = 0.9995


@merge_method(paper="https://doi.org/10.1145/325165.325242", needs_base=False, operands="weights", num_targets=2)
def slerp(weights: TensorDeltas, *, t: Share = 0.5) -> MergedDelta:
    """Spherical interpolation of two targets' weights, a share `t` of the way from the first to the second.

    Directions that are almost parallel, or not defined, are interpolated linearly.
    """
    return on_directions(weights, lambda found: arc(found, t, ALMOST_PARALLEL))


def arc(found: Directions, t: float, parallel: float) -> Tensor:
    """Coefficients [..., 2] of the point a share `t` along the arc; along the chord where |cosine| > `parallel` or a
    direction is missing."""
    cosine = torch.where((found.norms_J > 0).all(dim=-1), found.cosines_JJ[..., 0, 1], 1.0)
    angle = cosine.acos()
    on_arc = torch.stack([((1 - t) * angle).sin(), (t * angle).sin()], dim=-1) / angle.sin()[..., None]
    return torch.where((cosine.abs() > parallel)[..., None], torch.tensor([1 - t, t], dtype=torch.float64), on_arc)
