from fusion.merging.deltas import TensorDeltas
from fusion.merging.method import MergedDelta, merge_method
from fusion.merging.numerics.arithmetic import shares
from fusion.merging.numerics.election import Election
from fusion.merging.numerics.selection import NOTHING_SELECTED, SelectedSquares, most_varying
from fusion.merging.parameters import Share


@merge_method(paper="https://arxiv.org/abs/2408.07990")
def sce(deltas: TensorDeltas, *, tau: Share = 1.0, renormalize: bool = False) -> MergedDelta:
    """SCE (FuseChat v2, Algorithm 1), to the letter of the paper.

    Select the share `tau` of positions that vary most across targets and zero all others; calculate
    eta_j = sum d_j^2 / sum_i sum d_i^2 over what is left; erase entries against the majority's sign; return
    sum_j eta_j d_j. `renormalize` divides per position by the eta that survived. A single target is kept whole.

    The published tau = 0.1 belongs to the authors' program, which merges the unselected deltas as well
    (`sce_released`). Here those are lost, and small values of tau lose most of what was learnt, so all are selected
    by default.
    """
    select = most_varying(deltas, tau)
    eta_J, events = shares(deltas.reduce(SelectedSquares(select)))
    return MergedDelta(Election(select, eta_J, renormalize), eta_J, (NOTHING_SELECTED,) if select.is_empty else events)
