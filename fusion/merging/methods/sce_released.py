import torch
from torch import Tensor

from fusion.merging.deltas import Block, TensorDeltas
from fusion.merging.method import MergedDelta, merge_method
from fusion.merging.numerics.arithmetic import shares
from fusion.merging.numerics.selection import Selected, largest_share
from fusion.merging.numerics.unwidened import population_variance, sums_of_squares
from fusion.merging.numerics.workspace import scratch
from fusion.merging.parameters import Share

NOTHING_WEIGHED = "no target has deltas at the selected positions: uniform coefficients"


@merge_method(paper="https://arxiv.org/abs/2408.07990", unwidened=True)
def sce_released(deltas: TensorDeltas, *, tau: Share = 0.1) -> MergedDelta:
    """SCE as the authors' program (https://github.com/fanqiwan/FuseAI) computes it, step by step.

    The most varying positions only decide on eta; the vote and the merge see every delta, and each position is
    divided by the eta that survived the vote. Every step is rounded to the dtype of the models, as there.

    Two things the program leaves to torch. Of equally varying positions, which 16 bits make many, those of lowest
    index are selected here. And the squares of a tensor beyond a block (131,072 elements) are added up block by block,
    where the program's sum depends on the number of threads.
    """
    energies_J = _energies(deltas, _most_varying(deltas, tau))
    eta_J, uniform = shares(energies_J)

    def merged(block: Block) -> Tensor:
        deltas_JN = block.deltas_JN
        majority_N = deltas_JN.sum(dim=0)
        torch.ge(majority_N, 0, out=majority_N).mul_(2).sub_(1)
        agrees_JN = torch.sign(deltas_JN, out=scratch("agrees", deltas_JN)).mul_(majority_N).clamp_(min=0)
        block.note("erased", lambda: _erased(deltas_JN, agrees_JN))
        weights_JN = agrees_JN.mul_(eta_J[:, None].to(deltas_JN))
        divisor_N = weights_JN.sum(dim=0)
        divisor_N += torch.eq(divisor_N, 0, out=torch.empty_like(divisor_N))
        return weights_JN.mul_(deltas_JN).sum(dim=0).div_(divisor_N).float()

    return MergedDelta(merged, eta_J, (NOTHING_WEIGHED,) if uniform else ())


def _erased(deltas_JN: Tensor, agrees_JN: Tensor) -> tuple[int, int]:
    """How many of the deltas that are not zero do not agree, and how many there are."""
    num_deltas = int(deltas_JN.count_nonzero())
    return num_deltas - int(agrees_JN.count_nonzero()), num_deltas


def _most_varying(deltas: TensorDeltas, tau: float) -> Selected | None:
    """None selects every position."""
    if tau >= 1 or deltas.num_targets == 1:
        return None
    return largest_share(deltas, _variance, tau)


def _variance(block: Block) -> Tensor:
    return population_variance(block.deltas_JN).float()[None]


def _energies(deltas: TensorDeltas, selected: Selected | None) -> Tensor:
    """The mean square of each target's selected deltas, rounded as the sum of a whole tensor is, float64 [J]."""

    def squares(block: Block) -> tuple[torch.dtype, Tensor]:
        chosen_JN = block.deltas_JN
        if selected is not None:
            variance_1N = _variance(block)
            selected.note(block, variance_1N)
            chosen_JN = chosen_JN * selected.mask(block, variance_1N).to(chosen_JN)
        return chosen_JN.dtype, sums_of_squares(chosen_JN)

    (dtype, *_), sums = zip(*deltas.map(squares), strict=True)
    return torch.stack(sums).sum(dim=0).to(dtype).double() / deltas.num_elements
