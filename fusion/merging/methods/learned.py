import torch

from fusion.merging.deltas import TensorDeltas
from fusion.merging.measuring.coefficients import learned_coefficients
from fusion.merging.method import MergedDelta, merge_method


@merge_method(paper="https://arxiv.org/abs/2310.02575", evidence=learned_coefficients)
def learned(deltas: TensorDeltas) -> MergedDelta:
    """Sum of the deltas with coefficients learned for each target and tensor: sum_j c_j d_j.

    As AdaMerging's layer-wise coefficients, but learned from the cross-entropy on held-out dialogues that a source
    won, where AdaMerging lowers the entropy of predictions on test inputs.
    """
    coefficients_J = torch.stack(deltas.evidence.whole(())).double()
    return MergedDelta.weighted(coefficients_J)
