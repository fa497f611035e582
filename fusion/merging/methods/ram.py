from typing import Annotated

import torch
from torch import Tensor

from fusion.merging.deltas import Block, TensorDeltas
from fusion.merging.method import MergedDelta, merge_method
from fusion.merging.numerics.arithmetic import sum_over_targets, weighted_sum
from fusion.merging.parameters import Between

NonNegative = Annotated[float, Between(0, 1e6)]


@merge_method(paper="https://arxiv.org/abs/2601.13572")
def ram(
    deltas: TensorDeltas, *, epsilon: NonNegative = 1e-5, boost: NonNegative = 0.0, limit: NonNegative = 0.2
) -> MergedDelta:
    """RAM: where several targets moved, the mean of those; where one did, its delta, which no average dilutes.

    A target moved at a position if |d| > `epsilon`. With a `boost` r (RAM+; 0.1 there) a target's unshared deltas are
    multiplied by 1 + r * min(rho, `limit`), rho = its shared positions / its unshared ones, per tensor.
    """
    counts_2J = deltas.reduce(lambda block: _counts(block, epsilon).double().cpu())
    rho_J = counts_2J[0] / counts_2J[1].clamp(min=1)
    factors_J = 1 + boost * rho_J.clamp(max=limit)

    def merged(block: Block) -> Tensor:
        moved_JN, number_N = _moved(block, epsilon)
        moved_JN *= block.deltas_JN
        block.note("erased", lambda: _erased(block, moved_JN))
        alone_N = weighted_sum(moved_JN, factors_J)
        return torch.where(number_N == 1, alone_N, sum_over_targets(moved_JN) / number_N.clamp(min=1))

    return MergedDelta(merged, factors_J)


def _moved(block: Block, epsilon: float) -> tuple[Tensor, Tensor]:
    """1.0 where a target moved, [J, N], and by how many of them, [N]."""
    moved_JN = (block.deltas_JN.abs() > epsilon).to(torch.float32)
    return moved_JN, sum_over_targets(moved_JN)


def _counts(block: Block, epsilon: float) -> Tensor:
    """Positions that each target shares with others, and those that it has alone, [2, J]."""
    moved_JN, number_N = _moved(block, epsilon)
    return torch.stack([(moved_JN * (number_N > 1)).sum(dim=1), (moved_JN * (number_N == 1)).sum(dim=1)])


def _erased(block: Block, kept_JN: Tensor) -> tuple[int, int]:
    num_deltas = int(torch.count_nonzero(block.deltas_JN))
    return num_deltas - int(torch.count_nonzero(kept_JN)), num_deltas
