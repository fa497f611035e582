from torch import Tensor

from fusion.merging.deltas import Block, TensorDeltas
from fusion.merging.method import MergedDelta, merge_method
from fusion.merging.numerics.arithmetic import agreed_sum, majority, shares, squared_norms
from fusion.merging.numerics.selection import most_varying
from fusion.merging.parameters import Share


@merge_method(paper="https://arxiv.org/abs/2408.07990")
def sce_released(deltas: TensorDeltas, *, tau: Share = 0.1) -> MergedDelta:
    """SCE as the authors' program (https://github.com/fanqiwan/FuseAI) computes it.

    The most varying positions only decide on eta; the vote and the merge see every delta, and each position is
    divided by the eta that survived the vote.
    """
    select = most_varying(deltas, tau)
    eta_J, events = shares(deltas.reduce(lambda block: squared_norms(select(block))))

    def merged(block: Block) -> Tensor:
        return agreed_sum(block, block.deltas_JN, eta_J, majority(block.deltas_JN), renormalize=True)

    return MergedDelta(merged, eta_J, events)
