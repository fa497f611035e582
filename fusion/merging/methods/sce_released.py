from torch import Tensor

from fusion.merging.arithmetic import agreed_sum, agreeing, shares, squared_norms
from fusion.merging.method import MergedDelta, merge_method
from fusion.merging.parameters import Share
from fusion.merging.selection import most_varying


@merge_method(paper="https://arxiv.org/abs/2408.07990")
def sce_released(deltas_JN: Tensor, *, tau: Share = 0.1) -> MergedDelta:
    """SCE as the authors' program (https://github.com/fanqiwan/FuseAI) computes it.

    The most varying positions only decide on eta; the vote and the merge see every delta, and each position is
    divided by the eta that survived the vote.
    """
    eta_J, events = shares(squared_norms(deltas_JN * most_varying(deltas_JN, tau)))
    return MergedDelta(agreed_sum(deltas_JN, eta_J, agreeing(deltas_JN), renormalize=True), eta_J, events)
