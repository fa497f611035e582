"""Blocks that are merged or measured from the stored bit patterns in one pass: no delta is ever written anywhere.

Shapes: J targets, N elements of a block.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from fusion.merging.deltas import Block
from fusion.merging.numerics import kernels
from fusion.merging.numerics.arithmetic import weighted_sum, wide


class Span(NamedTuple):
    """Where a block lies: the index of its first element within all elements that are merged, and their number."""

    position: int
    num_elements: int


class Patterns(NamedTuple):
    """A block of base and targets as bit patterns of bfloat16 (uint16), and where to put what is learnt of it."""

    block: Span
    base_N: np.ndarray
    targets_JN: np.ndarray
    squares_J: np.ndarray
    """Squared norms of the deltas, float64."""

    @property
    def inputs(self) -> tuple[np.ndarray, np.ndarray]:
        return self.base_N, self.targets_JN


@runtime_checkable
class OnePass(Protocol):
    """A merged delta that can also be merged in one pass, to the same bits."""

    def __call__(self, block: Block) -> Tensor:
        """The merged delta, float32 [N]."""

    def merge(self, patterns: Patterns, scale: float, rounded_N: np.ndarray) -> tuple[float, bool] | None:
        """Fill the squared norms, and `rounded_N` with base + scale * delta as bit patterns of bfloat16.

        Returns the squared norm of the base, and whether the rounded elements are finite; None where this block needs
        the longer way.
        """


@runtime_checkable
class OneLook(Protocol):
    """Something small that is learnt of a block, and can also be learnt in one pass, to the same bits."""

    def __call__(self, block: Block) -> Any:
        """What is learnt."""

    def look(self, patterns: Patterns) -> tuple[Any, float] | None:
        """Fill the squared norms; what is learnt, and the squared norm of the base.

        None where this block needs the longer way.
        """


@dataclass(frozen=True)
class WeightedSum:
    """sum_j w_j d_j."""

    weights_J: Tensor

    def __call__(self, block: Block) -> Tensor:
        return weighted_sum(block.deltas_JN, self.weights_J)

    def merge(self, patterns: Patterns, scale: float, rounded_N: np.ndarray) -> tuple[float, bool]:
        return kernels.merge_bfloat16(*patterns.inputs, wide(self.weights_J), scale, rounded_N, patterns.squares_J)
