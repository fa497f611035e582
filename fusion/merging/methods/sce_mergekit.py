import torch

from fusion.merging.deltas import TensorDeltas
from fusion.merging.method import MergedDelta, merge_method
from fusion.merging.numerics.election import Election
from fusion.merging.numerics.selection import SelectedSquares, most_varying
from fusion.merging.parameters import Share

LEAST = 1e-6
TOO_SMALL = "mean squared deltas sum to less than 1e-6: uniform coefficients"


@merge_method(paper="https://arxiv.org/abs/2408.07990")
def sce_mergekit(deltas: TensorDeltas, *, tau: Share = 1.0) -> MergedDelta:
    """SCE as mergekit 0.1.5 (https://github.com/arcee-ai/mergekit) computes it: for parity, not for use.

    Its coefficients are uniform whenever the mean squared deltas sum to less than 1e-6, which ordinary fine-tunes
    do, and positions are divided by at least 1e-6.
    """
    select = most_varying(deltas, tau)
    means_J = deltas.reduce(SelectedSquares(select)) / deltas.num_elements
    uniform = bool(means_J.sum() < LEAST)
    eta_J = torch.full_like(means_J, 1 / len(means_J)) if uniform else means_J / means_J.sum()
    return MergedDelta(Election(select, eta_J, True, least_divisor=LEAST), eta_J, (TOO_SMALL,) if uniform else ())
