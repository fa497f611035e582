from collections.abc import Callable
from typing import Annotated

import torch
from torch import Tensor

from fusion.merging.deltas import Block, TensorDeltas
from fusion.merging.method import MergedDelta, merge_method
from fusion.merging.numerics.selection import order_statistics
from fusion.merging.parameters import Between

QUARTERS = (0.25, 0.5, 0.75)


@merge_method(paper="https://github.com/arcee-ai/mergekit/blob/main/docs/merge_methods.md", num_targets=1)
def arcee_fusion(deltas: TensorDeltas, *, spread: Annotated[float, Between(0, 1e6)] = 1.5) -> MergedDelta:
    """Arcee Fusion: of one target's deltas only those of outstanding importance, d * (i >= t).

    The importance of an element is i = |d| * KL(softmax(target's row) || softmax(base's row)), a vector being one
    row. The threshold t is the median over the tensor plus `spread` times the distance between its quartiles, where
    the quantile q of N elements is the one of rank floor(q * (N - 1)), found exactly however large the tensor is.
    """
    divergences = _divergences(deltas)

    def importances(block: Block) -> Tensor:
        divergence_R = divergences(block)
        magnitudes_RC = block.deltas_JN.double().abs().view(len(divergence_R), -1)
        return (magnitudes_RC * divergence_R[:, None]).float().view(1, -1)

    ranks = [int(quarter * (deltas.num_elements - 1)) for quarter in QUARTERS]
    lower, median, upper = order_statistics(deltas, importances, ranks)
    threshold = median + spread * (upper - lower)

    def merged(block: Block) -> Tensor:
        mask_N = (importances(block)[0].double() >= threshold).float()
        block.note("selected", lambda: (int(mask_N.sum()), len(mask_N)))
        return mask_N.mul_(block.deltas_JN[0])

    return MergedDelta(merged, torch.ones(1, dtype=torch.float64))


def _divergences(deltas: TensorDeltas) -> Callable[[Block], Tensor]:
    """KL from the base's softmax to the target's, float64 [R], for the rows of a block.

    Where blocks cut rows, the tensor is one row.
    """
    if deltas.has_whole_rows:
        return lambda block: _divergence(_sums(block, _peak(block, deltas.row_length), deltas.row_length))
    peak_R = torch.stack(deltas.map(lambda block: _peak(block, block.num_elements))).amax(dim=0)
    divergence_R = _divergence(deltas.reduce(lambda block: _sums(block, peak_R, block.num_elements)))
    return lambda block: divergence_R


def _rows(block: Block, length: int) -> tuple[Tensor, Tensor]:
    """Weights of the target and of the base, float64 [R, C]."""
    assert block.origin_N is not None, "the engine refuses a merge without base"
    base_N = block.origin_N.double()
    return (base_N + block.deltas_JN[0]).view(-1, length), base_N.view(-1, length)


def _peak(block: Block, length: int) -> Tensor:
    """Largest weight of each row, [R]: what exponents are taken from, so that none overflows."""
    target_RC, base_RC = _rows(block, length)
    return torch.maximum(target_RC.amax(dim=1), base_RC.amax(dim=1))


def _sums(block: Block, peak_R: Tensor, length: int) -> Tensor:
    """Sums over rows of e^x, e^y, e^x (x - y) and e^x - e^y, x being the target's weights and y the base's, [4, R].

    The last is added up from differences, since deltas are small: the sums alone would hide them.
    """
    target_RC, base_RC = _rows(block, length)
    powers_RC, of_base_RC = (target_RC - peak_R[:, None]).exp(), (base_RC - peak_R[:, None]).exp()
    deltas_RC = block.deltas_JN[0].double().view(-1, length)
    differences_RC = torch.maximum(powers_RC, of_base_RC) * deltas_RC.sign() * -deltas_RC.abs().neg().expm1()
    return torch.stack([powers_RC, of_base_RC, powers_RC * deltas_RC, differences_RC]).sum(dim=2)


def _divergence(sums_4R: Tensor) -> Tensor:
    """sum_c p_c (x_c - y_c) - log(sum_c e^x_c / sum_c e^y_c), never below zero."""
    of_target_R, of_base_R, products_R, differences_R = sums_4R
    return (products_R / of_target_R - (differences_R / of_base_R).log1p()).clamp(min=0)
