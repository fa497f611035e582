"""Steps of programs that compute in the dtype of the models: every result is rounded to it.

Shapes: J targets, N elements of a block.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from fusion.merging.deltas import Block, Loaded, Operands, Result, Run
from fusion.merging.numerics.workspace import Workspace

TILE = 2048
_scratch = Workspace()


@dataclass(frozen=True)
class UnwidenedOperands:
    """Operands as such a program sees them: differences in the dtype of the models."""

    operands: Operands
    dtype: torch.dtype

    def load(self, start: int, stop: int) -> Loaded:
        origin_N, operands_JN = self.operands.load(start, stop)
        return Loaded(origin_N, _in_dtype("unwidened", operands_JN, self.dtype))

    def looked_at(self, start: int, stop: int, function: Callable[[Block], Result]) -> Result | None:
        return None

    def keep(self) -> None:
        self.operands.keep()

    def whole(self, run: Run) -> Tensor:
        return self.operands.whole(run).to(self.dtype)


def population_variance(deltas_JN: Tensor) -> Tensor:
    """`torch.var` of each position across targets, bit by bit, in the dtype of the deltas, [N].

    On a CPU it is the same recurrence (Welford, https://doi.org/10.2307/1266577) in float64, which torch runs through
    one position at a time.
    """
    if deltas_JN.device.type != "cpu":
        return deltas_JN.var(dim=0, unbiased=False)
    variance_N = _scratch.buffer("variance", deltas_JN.shape[1], torch.float64, deltas_JN.device)
    widened_JN = _in_dtype("widened", deltas_JN, _at_least_float32(deltas_JN))
    _welford(widened_JN.contiguous().numpy(), variance_N.numpy())
    return variance_N.to(deltas_JN.dtype)


@njit(cache=True, nogil=True)
def _welford(values_KN: Any, variance_N: Any) -> None:
    mean_T = np.empty(TILE, dtype=np.float64)
    for start in range(0, len(variance_N), TILE):
        squares_T = variance_N[start : start + TILE]
        mean_T[:] = 0.0
        squares_T[:] = 0.0
        for k in range(len(values_KN)):
            values_T, count = values_KN[k, start : start + TILE], np.float64(k + 1)
            for n in range(len(squares_T)):
                value = np.float64(values_T[n])
                step = value - mean_T[n]
                mean_T[n] += step / count
                squares_T[n] += step * (value - mean_T[n])
        for n in range(len(squares_T)):
            squares_T[n] /= np.float64(len(values_KN))


def sums_of_squares(values_JN: Tensor) -> Tensor:
    """As `torch.sum(values ** 2)` of each row adds them up, before that is rounded: [J], float64.

    Up to a block's size that is torch's own order, so the sum has its very bits.
    """
    sums = [torch.sum(values_N.square(), dtype=_at_least_float32(values_N)) for values_N in values_JN]
    return torch.stack(sums).double().cpu()


def _in_dtype(name: str, values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` as they are if they have the dtype, else a copy that the next call of that `name` overwrites."""
    if values.dtype == dtype:
        return values
    return _scratch.buffer(name, values.numel(), dtype, values.device).view(values.shape).copy_(values)


def _at_least_float32(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)
