"""Ranks of magnitudes within rows, for methods that treat large deltas of a row unlike small ones.

Shapes: J targets, N elements of one block, R rows of C elements.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fusion.merging.deltas import Block, TensorDeltas

PLACES = (1 << 32) - 1


def relative_ranks(deltas: TensorDeltas) -> Callable[[Block], Tensor]:
    """0 for the smallest magnitude of a row, 1 for the largest, 0.5 in rows of one element: float64 [J, N] of a block.

    Of equal magnitudes the first has the lower rank. Where blocks cut rows, the ranks of the whole tensor are held in
    memory: 12 bytes for every element of every target.
    """
    if deltas.has_whole_rows:
        return lambda block: _relative(ranks_in_rows(block.rows_JRC.abs())).flatten(1)
    magnitudes_JN = torch.cat(deltas.map(lambda block: block.deltas_JN.abs()), dim=1)
    ranks_JN = _relative(ranks_in_rows(magnitudes_JN.unflatten(1, (-1, deltas.row_length)))).flatten(1)
    return lambda block: ranks_JN[:, block.start : block.start + block.num_elements]


def ranks_in_rows(keys_XC: Tensor) -> Tensor:
    """Places, int64 [..., C], of non-negative float32 in the ascending order of their rows; equal ones as they stand.

    Every bit pattern gets its place for a lower half, so that no two are equal and any sort is stable. NumPy's takes
    a fortieth of the time of a stable sort in torch.
    """
    places_C = torch.arange(keys_XC.shape[-1], device=keys_XC.device)
    patterns_XC = (keys_XC.view(torch.int32).long() << 32) | places_C
    if patterns_XC.device.type == "cpu":
        patterns_XC.numpy().sort(axis=-1)
    else:
        patterns_XC = patterns_XC.sort(dim=-1).values
    order_XC = patterns_XC & PLACES
    return torch.empty_like(order_XC).scatter_(-1, order_XC, places_C.expand_as(order_XC))


def _relative(ranks_JRC: Tensor) -> Tensor:
    length = ranks_JRC.shape[-1]
    return ranks_JRC.double() / (length - 1) if length > 1 else torch.full_like(ranks_JRC, 0.5, dtype=torch.float64)
