"""Lengths of the targets' deltas and the angles between them: all that methods on the sphere need to know.

What such a method returns is a combination of the deltas, so its coefficients follow from inner products alone, in
float64, and one more pass over the deltas makes the result. Shapes: J targets, R rows, N elements of a block.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fusion.merging.deltas import LONGEST_ROW, Block, TensorDeltas
from fusion.merging.method import MergedDelta

Unit = Literal["tensor", "row"]
WHOLE_TENSOR = "rows are missing or huge here: the tensor is one direction"


@dataclass(frozen=True)
class Directions:
    """Of one direction per target, or of R ones: shapes are [..., J] and [..., J, J], float64."""

    norms_J: Tensor
    cosines_JJ: Tensor
    """0 where a target did not move, also with itself."""

    @classmethod
    def of(cls, products_JJ: Tensor) -> "Directions":
        norms_J = products_JJ.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
        lengths_JJ = norms_J[..., :, None] * norms_J[..., None, :]
        return cls(norms_J, torch.where(lengths_JJ > 0, products_JJ / lengths_JJ, 0.0).clamp(-1, 1))

    @property
    def inverse_norms_J(self) -> Tensor:
        """0 for a target that did not move."""
        return torch.where(self.norms_J > 0, 1 / self.norms_J, 0.0)

    def with_least_product(self, least: float) -> "Directions":
        """Cosines as a program finds them that divides by products of lengths of at least so much."""
        products_JJ = self.norms_J[..., :, None] * self.norms_J[..., None, :]
        return replace(self, cosines_JJ=self.cosines_JJ * products_JJ / products_JJ.clamp(min=least))

    @property
    def mean_cosine(self) -> Tensor:
        """Over all pairs of targets, [...]."""
        num_targets = self.norms_J.shape[-1]
        pairs = torch.triu_indices(num_targets, num_targets, offset=1)
        return self.cosines_JJ[..., pairs[0], pairs[1]].mean(dim=-1)


Coefficients = Callable[[Directions], Tensor]
"""[..., J]: the weight of each target's delta."""


def on_directions(deltas: TensorDeltas, coefficients: Coefficients, unit: Unit = "tensor") -> MergedDelta:
    """sum_j c_j d_j, with coefficients that follow from the directions of whole tensors, or of every row."""
    has_rows = len(deltas.shape) > 1 and deltas.shape[-1] <= LONGEST_ROW
    if unit == "row" and has_rows:
        return _by_row(deltas, coefficients)
    products_JJ = deltas.reduce(lambda block: _products(block.deltas_JN[:, None])[0].cpu())
    found_J = coefficients(Directions.of(products_JJ))
    events = (WHOLE_TENSOR,) if unit == "row" else ()
    return MergedDelta.weighted(found_J, events)


def _by_row(deltas: TensorDeltas, coefficients: Coefficients) -> MergedDelta:
    def rows_of(block: Block) -> Tensor:
        return coefficients(Directions.of(_products(block.rows_JRC)))

    def merged(block: Block) -> Tensor:
        weights_JR1 = rows_of(block).T[:, :, None].to(torch.float32)
        return (block.rows_JRC * weights_JR1).sum(dim=0).flatten()

    total_J = deltas.reduce(lambda block: rows_of(block).sum(dim=0).cpu())
    return MergedDelta(merged, total_J * deltas.shape[-1] / deltas.num_elements)


def _products(rows_JRC: Tensor) -> Tensor:
    """Inner products of the targets' rows, [R, J, J], float64."""
    wide_JRC = rows_JRC.double()
    num_targets, num_rows, _ = rows_JRC.shape
    products_RJJ = wide_JRC.new_empty(num_rows, num_targets, num_targets)
    for one in range(num_targets):
        for other in range(one, num_targets):
            products_RJJ[:, one, other] = (wide_JRC[one] * wide_JRC[other]).sum(dim=-1)
            products_RJJ[:, other, one] = products_RJJ[:, one, other]
    return products_RJJ
