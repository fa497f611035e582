"""What is learnt about deltas while they stream by. Shapes: J targets, N elements of a block.

Norms are taken of every block. What costs more (angles between targets, conflicts, the notes of a method) is taken of
every eighth block of a tensor, its first one included: whole for tensors of one block, a sample of the large ones.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fusion.merging.deltas import Counts
from fusion.merging.numerics import kernels
from fusion.merging.numerics.arithmetic import on_cpu, rows

WATCH_EVERY = 8


@dataclass(frozen=True)
class BlockStatistics:
    """`squares_J`: squared norms, float64. Watched blocks: inner products and positions with both signs, too."""

    squares_J: Tensor
    num_watched: int = 0
    products_JJ: Tensor | None = None
    num_conflicts: int = 0

    @classmethod
    def of(cls, deltas_JN: Tensor, squares_J: Tensor, watched: bool) -> "BlockStatistics":
        if not watched:
            return cls(squares_J)
        return cls(squares_J, deltas_JN.shape[1], *_angles(deltas_JN))


@dataclass(frozen=True)
class TensorRecord:
    """One merged tensor, for the report. JSON keeps it exactly.

    `norms` [J] are exact; `products` [J][J], `conflicts` (share of positions) and `notes` (name -> part and whole) are
    of the watched blocks, scaled up to the tensor.
    """

    name: str
    num_elements: int
    coefficients: list[float]
    norms: list[float]
    products: list[list[float]]
    conflicts: float
    notes: dict[str, list[float]] = field(default_factory=dict)
    events: list[str] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        name: str,
        blocks: Iterable[BlockStatistics],
        coefficients_J: Tensor,
        notes: Iterable[dict[str, Counts]],
        events: Iterable[str],
        num_elements: int,
    ) -> "TensorRecord":
        """Put the blocks, which come in the order of elements, together."""
        blocks = list(blocks)
        squares_J = torch.stack([block.squares_J for block in blocks]).cumsum(dim=0)[-1]
        watched = [block for block in blocks if block.products_JJ is not None]
        factor = num_elements / sum(block.num_watched for block in watched)
        products_JJ = torch.stack([block.products_JJ for block in watched if block.products_JJ is not None])
        products_JJ = products_JJ.cumsum(dim=0)[-1] * factor
        return cls(
            name,
            num_elements,
            coefficients_J.tolist(),
            squares_J.sqrt().tolist(),
            products_JJ.tolist(),
            sum(block.num_conflicts for block in watched) * factor / num_elements,
            _total(notes, factor),
            list(events),
        )


def _angles(deltas_JN: Tensor) -> tuple[Tensor, int]:
    """Inner products [J, J], float64, and the number of positions with both signs."""
    if on_cpu(deltas_JN):
        products_JJ = torch.empty(len(deltas_JN), len(deltas_JN), dtype=torch.float64)
        kernels.inner_products(rows(deltas_JN), products_JJ.numpy())
        return products_JJ, kernels.count_conflicts(rows(deltas_JN))
    wide_JN = deltas_JN.double()
    conflicts_N = (deltas_JN.amax(dim=0) > 0) & (deltas_JN.amin(dim=0) < 0)
    return (wide_JN @ wide_JN.T).cpu(), int(torch.count_nonzero(conflicts_N))


def _total(notes: Iterable[dict[str, Counts]], factor: float) -> dict[str, list[float]]:
    totals: dict[str, list[float]] = {}
    for counts in notes:
        for name, (part, whole) in counts.items():
            total = totals.setdefault(name, [0.0, 0.0])
            total[0] += part * factor
            total[1] += whole * factor
    return totals
