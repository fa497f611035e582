"""Merged blocks that are made of the stored bit patterns in one pass, so that no delta is ever written anywhere.

Shapes: J targets, N elements of a block.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

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
    """A block of base and targets as bit patterns of bfloat16 (uint16), and where to put what is made of it."""

    block: Span
    base_N: np.ndarray
    targets_JN: np.ndarray
    rounded_N: np.ndarray
    """base + scale * delta, bit patterns of bfloat16."""
    squares_J: np.ndarray
    """Squared norms of the deltas, float64."""

    @property
    def inputs(self) -> tuple[np.ndarray, np.ndarray]:
        return self.base_N, self.targets_JN

    @property
    def results(self) -> tuple[np.ndarray, np.ndarray]:
        return self.rounded_N, self.squares_J


@runtime_checkable
class OnePass(Protocol):
    """A merged delta that can also be merged in one pass, to the same bits."""

    def __call__(self, block: Block) -> Tensor:
        """The merged delta, float32 [N]."""

    def merge(self, patterns: Patterns, scale: float) -> tuple[float, bool] | None:
        """Fill the results; the squared norm of the base, and whether the rounded elements are finite.

        None where this block needs the longer way.
        """


@dataclass(frozen=True)
class WeightedSum:
    """sum_j w_j d_j."""

    weights_J: Tensor

    def __call__(self, block: Block) -> Tensor:
        return weighted_sum(block.deltas_JN, self.weights_J)

    def merge(self, patterns: Patterns, scale: float) -> tuple[float, bool]:
        return kernels.merge_bfloat16(*patterns.inputs, wide(self.weights_J), scale, *patterns.results)
