"""One tensor's deltas as a method sees them: lazily, block by block, in as many passes as the method wants.

A block is a fixed run of a tensor's elements, whole rows where rows are not huge. Every function of a method works on
one block at a time and results are put together in the order of elements, so neither threads, memory, nor a resumed
run can change a bit. Shapes: J targets, N elements of a block, R rows of C elements, K rows of a mask.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")
Item = TypeVar("Item")
Counts = tuple[int, int]
BLOCK_ELEMENTS = 1 << 17
LONGEST_ROW = 8 * BLOCK_ELEMENTS
PIECES, PIECE_ELEMENTS, SAMPLED = 16, 8192, 4096
"""A sample has about so many pieces, of so many elements or the rows that hold them; so many are taken of each."""


@dataclass(frozen=True)
class Block:
    """What a method's inner functions get. Its tensors are used again for the next block: never keep them."""

    deltas_JN: Tensor
    """float32 (with `operands="weights"`: the targets' weights)."""
    start: int
    """Index of the first element within the tensor, flattened in row-major order."""
    position: int
    """Index of the first element within all elements of the model that are merged."""
    row_length: int
    """Elements of the tensor's last dimension (1 for a scalar)."""
    notes: dict[str, Counts] | None = None
    """Where `note` writes to; None when nobody looks at this block."""
    origin_N: Tensor | None = None
    """The base's elements, float32 or better; None without a base."""

    @property
    def num_elements(self) -> int:
        return self.deltas_JN.shape[1]

    @property
    def rows_JRC(self) -> Tensor:
        """The deltas by rows, for tensors that are not cut within them (`TensorDeltas.has_whole_rows`)."""
        return self.deltas_JN.unflatten(1, (-1, self.row_length))

    def note(self, name: str, counts: Callable[[], Counts]) -> None:
        """Tell the report which part of how many entries `name` is true of, such as ("erased", (3, 100)).

        Only every eighth block is asked, so counting costs next to nothing.
        """
        if self.notes is not None:
            self.notes[name] = counts()


@dataclass(frozen=True)
class Run:
    """Calls a function on every item, in turn or on a pool's threads; results in the order of the items."""

    pool: Executor | None = None
    width: int = 1

    def __call__(self, function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        return list(self.pool.map(function, items) if self.pool else map(function, items))


class Passes(ABC):
    """Passes over the blocks of a tensor, or of a whole model."""

    num_targets: int
    num_elements: int

    @abstractmethod
    def map(self, function: Callable[[Block], Result]) -> list[Result]:
        """`function` of every block, in the order of elements; results must be small."""

    @abstractmethod
    def sample(self, function: Callable[[Block], Tensor]) -> Tensor:
        """`function` ([K, N] of a block) of the first elements of some blocks, evenly spread, [K, M] on the CPU."""

    @property
    def stride(self) -> int:
        """How far apart, in elements, the sampled blocks lie."""
        return max(2 * BLOCK_ELEMENTS, self.num_elements // PIECES)

    def reduce(self, statistic: Callable[[Block], Tensor]) -> Tensor:
        """Sum over all blocks of a small float64 tensor, added in the order of elements."""
        return sum_in_place(self.map(statistic))


class Loaded(NamedTuple):
    """The base's elements [N] in float32 or better (None without a base), and what the method works on, [J, N]."""

    origin_N: Tensor | None
    operands_JN: Tensor


class Operands(Protocol):
    """Where the blocks of one tensor come from."""

    def load(self, start: int, stop: int) -> Loaded:
        """The elements from `start` to before `stop`: a block, or its beginning."""

    def looked_at(self, start: int, stop: int, function: Callable[[Block], Result]) -> Result | None:
        """`function` of a block, where it can be told more quickly than from what is loaded; else None."""

    def keep(self) -> None:
        """There will be more than one pass: keep what is read, if it fits."""

    def whole(self, run: "Run") -> Tensor:
        """All operands at once, [J, elements]."""


@dataclass(frozen=True)
class HeldOperands:
    """Deltas [J, elements] that are in memory anyway."""

    deltas: Tensor

    def load(self, start: int, stop: int) -> Loaded:
        return Loaded(None, self.deltas[:, start:stop])

    def looked_at(self, start: int, stop: int, function: Callable[[Block], Result]) -> Result | None:
        return None

    def keep(self) -> None:
        pass

    def whole(self, run: "Run") -> Tensor:
        return self.deltas


@dataclass(frozen=True)
class TensorDeltas(Passes):
    """The targets' differences from the base on one tensor: the first argument of every merge method."""

    name: str
    shape: tuple[int, ...]
    num_targets: int
    operands: Operands
    position: int = 0
    """Index of its first element within all elements of the model that are merged."""
    seed: int = 0
    survey: Any = None
    """What the method's `survey` returned."""
    evidence: Any = None
    """What was measured on dialogues of this tensor, a `TensorEvidence`, for methods that take evidence."""
    run: Run = field(default=Run(), repr=False)

    @classmethod
    def of(cls, deltas_JN: Tensor, name: str = "", seed: int = 0, evidence: Any = None) -> "TensorDeltas":
        """Deltas that are in memory: for trying a method out."""
        operands = HeldOperands(deltas_JN.flatten(1))
        return cls(name, tuple(deltas_JN.shape[1:]), len(deltas_JN), operands, seed=seed, evidence=evidence)

    @property
    def num_elements(self) -> int:  # type: ignore[override]
        return math.prod(self.shape)

    @property
    def starts(self) -> range:
        """Where the blocks begin."""
        return range(0, self.num_elements, block_length(self.shape))

    def span(self, start: int) -> tuple[int, int]:
        return start, min(start + self.starts.step, self.num_elements)

    @property
    def row_length(self) -> int:
        """Elements of the last dimension (1 for a scalar)."""
        return self.shape[-1] if self.shape else 1

    @property
    def has_whole_rows(self) -> bool:
        """Whether no block ends within a row. Long vectors are cut, and rows beyond a million elements."""
        return len(self.starts) == 1 or self.starts.step % self.row_length == 0

    def block(
        self,
        start: int,
        operands_JN: Tensor,
        notes: dict[str, Counts] | None = None,
        origin_N: Tensor | None = None,
    ) -> Block:
        return Block(operands_JN, start, self.position + start, self.row_length, notes, origin_N)

    def map(self, function: Callable[[Block], Result]) -> list[Result]:
        self.operands.keep()

        def look(start: int) -> Result:
            found = self.operands.looked_at(*self.span(start), function)
            return function(self._load(start)) if found is None else found

        return self.run(look, self.starts)

    def sample(self, function: Callable[[Block], Tensor]) -> Tensor:
        return torch.cat(self.pieces(function, self.stride, 0), dim=1)

    def pieces(self, function: Callable[[Block], Tensor], stride: int, position: int) -> list[Tensor]:
        """`function` of the first elements of those blocks in which a multiple of `stride` falls.

        `position` is that of the tensor's first element; rows are not cut unless blocks cut them.
        """
        self.operands.keep()
        unit = self.row_length if self.has_whole_rows else 1
        length = math.ceil(PIECE_ELEMENTS / unit) * unit

        def piece(start: int) -> Tensor:
            values_KN = function(self._load(start, length))
            return values_KN[:, :: max(1, values_KN.shape[1] // SAMPLED)].cpu().clone()

        spans = map(self.span, self.starts)
        return self.run(piece, [start for start, stop in spans if -(position + start) % stride < stop - start])

    def whole(self) -> Tensor:
        """All deltas at once, float32 [J, *shape]: for methods marked with `whole=True`, whose memory is planned."""
        return self.operands.whole(self.run).reshape(self.num_targets, *self.shape)

    def _load(self, start: int, length: float = math.inf) -> Block:
        """A block, or its first `length` elements."""
        stop = self.span(start)[1]
        origin_N, operands_JN = self.operands.load(start, int(min(start + length, stop)))
        return self.block(start, operands_JN, origin_N=origin_N)


@dataclass(frozen=True)
class ModelDeltas(Passes):
    """All tensors of a merge, for a method's `survey`: what must be known before the first tensor is merged."""

    num_targets: int
    num_elements: int
    per_tensor: "PerTensor"
    """Calls a function on the deltas of every tensor; tensor name -> result, in the model's order."""

    def map(self, function: Callable[[Block], Result]) -> list[Result]:
        by_tensor = self.per_tensor(lambda deltas: deltas.map(function))
        return [result for results in by_tensor.values() for result in results]

    def sample(self, function: Callable[[Block], Tensor]) -> Tensor:
        by_tensor = self.per_tensor(lambda deltas: deltas.pieces(function, self.stride, deltas.position))
        return torch.cat([piece for pieces in by_tensor.values() for piece in pieces], dim=1)


class PerTensor(Protocol):
    def __call__(self, function: Callable[[TensorDeltas], Result]) -> dict[str, Result]: ...


def sum_in_place(values: Iterable[Tensor]) -> Tensor:
    """Sum in the order given; at least one value is needed, and the first may be changed."""
    remaining = iter(values)
    total = next(remaining)
    for value in remaining:
        total += value
    return total


def block_length(shape: Sequence[int]) -> int:
    """Elements of a block: as many whole rows as fit, at least one; rows beyond a million elements are cut."""
    row_length = shape[-1] if len(shape) > 1 else 1
    if row_length > LONGEST_ROW:
        return BLOCK_ELEMENTS
    return max(1, BLOCK_ELEMENTS // row_length) * row_length


def in_blocks(delta: Tensor) -> Callable[[Block], Tensor]:
    """A whole merged delta, in the tensor's shape, as `MergedDelta` wants it."""
    flat = delta.reshape(-1).to(torch.float32)
    return lambda block: flat[block.start : block.start + block.num_elements]
