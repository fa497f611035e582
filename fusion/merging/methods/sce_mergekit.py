import torch
from torch import Tensor

from fusion.merging.arithmetic import agreed_sum, agreeing, squared_norms
from fusion.merging.method import MergedDelta, merge_method
from fusion.merging.parameters import Share
from fusion.merging.selection import most_varying

LEAST = 1e-6
TOO_SMALL = "mean squared deltas sum to less than 1e-6: uniform coefficients"


@merge_method(paper="https://arxiv.org/abs/2408.07990")
def sce_mergekit(deltas_JN: Tensor, *, tau: Share = 1.0) -> MergedDelta:
    """SCE as mergekit 0.1.5 (https://github.com/arcee-ai/mergekit) computes it: for parity, not for use.

    Its coefficients are uniform whenever the mean squared deltas sum to less than 1e-6, which ordinary fine-tunes
    do, and positions are divided by at least 1e-6.
    """
    selected_JN = deltas_JN * most_varying(deltas_JN, tau)
    means_J = squared_norms(selected_JN) / deltas_JN.shape[1]
    uniform = bool(means_J.sum() < LEAST)
    eta_J = torch.full_like(means_J, 1 / len(means_J)) if uniform else means_J / means_J.sum()
    merged_N = agreed_sum(selected_JN, eta_J, agreeing(selected_JN), renormalize=True, least_divisor=LEAST)
    return MergedDelta(merged_N, eta_J, (TOO_SMALL,) if uniform else ())
