"""The blocks of one tensor, read from files or memory: the base and the deltas of the targets.

Shapes: J targets, N elements of a block.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fusion.config import UserError
from fusion.merging.checkpoints.checkpoint import Checkpoint
from fusion.merging.checkpoints.tensor_file import TensorHome
from fusion.merging.deltas import Block, Loaded, Result, Run, block_length
from fusion.merging.numerics import kernels
from fusion.merging.numerics.arithmetic import are_normal, exact_where_needed, squared_norms
from fusion.merging.numerics.one_pass import OneLook, OnePass, Patterns, Span
from fusion.merging.numerics.workspace import Workspace
from fusion.merging.plan import MergePlan, State, input_labels
from fusion.merging.statistics import WATCH_EVERY, BlockStatistics

CPU = torch.device("cpu")


class NotFiniteError(UserError):
    """An input holds NaN or infinities."""


def not_finite(label: str, name: str) -> str:
    return f"{label}: '{name}' holds NaN or infinities: merging would spread them"


class Reader(Protocol):
    """Reads elements of one tensor of one input."""

    def read(self, start: int, into_N: Tensor) -> None:
        """Fill `into_N` with the elements from `start` on, in their own dtype."""


@dataclass(frozen=True)
class FileReader:
    file: TensorHome
    name: str

    def read(self, start: int, into_N: Tensor) -> None:
        self.file.read_span(self.name, start, into_N)


@dataclass(frozen=True)
class TensorReader:
    """Of a tensor in memory, flattened."""

    tensor_N: Tensor

    def read(self, start: int, into_N: Tensor) -> None:
        into_N.copy_(self.tensor_N[start : start + len(into_N)])


def reader_of(state: State, name: str) -> Reader:
    if isinstance(state, Checkpoint):
        return FileReader(state.homes[name], name)
    return TensorReader(state[name].detach().reshape(-1))


class TensorInputs:
    """The elements of one tensor of all inputs in their own dtype, read block by block, and kept if that is asked for.

    Shapes: I inputs.
    """

    def __init__(self, plan: MergePlan, name: str, workspace: Workspace, keep_bytes: int) -> None:
        self.name, self.spec, self.length = name, plan.specs[name], block_length(plan.specs[name].shape)
        self._workspace = workspace
        self._readers = [reader_of(state, name) for state in plan.inputs.values()]
        from_files = any(isinstance(reader, FileReader) for reader in self._readers)
        self._keeps = from_files and len(self._readers) * self.spec.num_bytes <= keep_bytes
        self._arena: Tensor | None = None
        self._kept: dict[int, Tensor] = {}

    def keep(self) -> None:
        """There will be more than one pass: keep what is read, if it fits."""
        if self._keeps and self._arena is None:
            self._arena = self._buffer("kept", self.spec.num_elements)

    def read(self, start: int, stop: int, num_inputs: int | None = None) -> Tensor:
        """The elements of a block of all inputs, or of the first few (the others are unset then), [I, N].

        Of a block's beginning, too, which is not kept.
        """
        if start in self._kept:
            return self._kept[start][:, : stop - start].contiguous()
        count, size = len(self._readers), stop - start
        flat = self._buffer("read", size) if self._arena is None else self._arena[count * start :]
        raws_IN = flat[: count * size].view(count, size)
        for reader, raw_N in zip(self._readers[:num_inputs], raws_IN, strict=False):
            reader.read(start, raw_N)
        if self._arena is not None and num_inputs is None and self.is_block(start, stop):
            self._kept[start] = raws_IN
        return raws_IN

    def is_block(self, start: int, stop: int) -> bool:
        """Whether these are all elements of a block."""
        return stop == min(start + self.length, self.spec.num_elements)

    def _buffer(self, name: str, num_elements: int) -> Tensor:
        """Memory on the CPU for so many elements of every input."""
        return self._workspace.buffer(name, len(self._readers) * num_elements, self.spec.dtype, CPU)


class TensorOperands:
    """Base and targets of one tensor, widened to float32 (float64 tensors: subtracted in float64 before that).

    Every block is looked at once, when it is first loaded: its statistics are taken, and NaN or infinities refused.
    """

    def __init__(self, plan: MergePlan, inputs: TensorInputs, workspace: Workspace, device: torch.device) -> None:
        self._plan, self._inputs, self._workspace, self._device = plan, inputs, workspace, device
        self._dtype, self._num_elements = inputs.spec.dtype, inputs.spec.num_elements
        self._first = len(plan.inputs) - len(plan.targets)
        """Which input is the first target: 1 behind a base, else 0."""
        self._subtracts = bool(self._first) and plan.method.operands == "deltas"
        self._whole: Tensor | None = None
        self.statistics: dict[int, BlockStatistics] = {}

    def watched(self, start: int) -> bool:
        """Whether the block that starts there is one of those that are looked at closely."""
        return start // self._inputs.length % WATCH_EVERY == 0

    def keep(self) -> None:
        self._inputs.keep()

    def load(self, start: int, stop: int) -> Loaded:
        """The elements from `start` to before `stop`, which must be a block, or its beginning: not looked at then.

        Raises:
            UserError: an input holds NaN or infinities there.
        """
        if self._whole is not None:
            raws_IN = self._inputs.read(start, stop, self._first)
            return Loaded(self._origin(raws_IN), self._whole[:, start:stop])
        raws_IN = self._inputs.read(start, stop)
        if self._dtype == torch.bfloat16 and self._device == CPU:
            loaded, squares_J, is_finite = self._load_compiled(raws_IN)
        else:
            origin_N = self._origin(raws_IN)
            loaded = Loaded(origin_N, self._operands(origin_N, raws_IN[self._first :]))
            squares_J = squared_norms(loaded.operands_JN)
            is_finite = origin_N is None or math.isfinite(squared_norms(origin_N[None]))
        if start not in self.statistics and self._inputs.is_block(start, stop):
            if not is_finite or not all(map(math.isfinite, squares_J.tolist())):
                self._refuse(raws_IN)
            self.statistics[start] = BlockStatistics.of(loaded.operands_JN, squares_J, self.watched(start))
        return loaded

    def merged(self, start: int, stop: int, delta: OnePass, scale: float) -> Tensor | None:
        """base + scale * delta of a block that is not watched, rounded to the dtype of the inputs, [N].

        The bits are those of `load`, the delta and `scaled_sum`, but deltas are never written anywhere. None where
        that cannot be (no base, another dtype or device) or something is not finite, which they know more of.
        """
        patterns = self._patterns(start, stop)
        if patterns is None:
            return None
        rounded_N = self._workspace.buffer("rounded", stop - start, torch.bfloat16, CPU)
        found = delta.merge(patterns, scale, rounded_N.view(torch.uint16).numpy())
        return rounded_N if found and self._learns(start, patterns, found[0]) and found[1] else None

    def looked_at(self, start: int, stop: int, function: Callable[[Block], Result]) -> Result | None:
        """`function` of a block without its deltas, where that can be: see `merged`."""
        if not isinstance(function, OneLook) or (self.watched(start) and start not in self.statistics):
            return None
        patterns = self._patterns(start, stop)
        found = function.look(patterns) if patterns else None
        return found[0] if found and patterns and self._learns(start, patterns, found[1]) else None

    def _patterns(self, start: int, stop: int) -> Patterns | None:
        """A block for compiled loops that take all there is to do; None where there are none."""
        if not self._subtracts or self._whole is not None or self._dtype != torch.bfloat16 or self._device != CPU:
            return None
        raws = self._inputs.read(start, stop).view(torch.uint16).numpy()
        span = Span(self._plan.positions[self._inputs.name] + start, stop - start)
        return Patterns(span, raws[0], raws[1:], np.empty(len(raws) - 1))

    def _learns(self, start: int, patterns: Patterns, base_square: float) -> bool:
        """Keep the statistics of a block that is seen for the first time; False where they need a closer look."""
        if start not in self.statistics:
            squares_J = torch.from_numpy(patterns.squares_J)
            if not (0 < base_square < math.inf and are_normal(squares_J)):
                return False
            self.statistics[start] = BlockStatistics(squares_J)
        return True

    def whole(self, run: Run) -> Tensor:
        if self._whole is None:
            whole = torch.empty(len(self._plan.targets), self._num_elements, device=self._device)

            def fill(start: int) -> None:
                stop = min(start + self._inputs.length, self._num_elements)
                whole[:, start:stop] = self.load(start, stop).operands_JN

            run(fill, range(0, self._num_elements, self._inputs.length))
            self._whole = whole
        return self._whole

    def _load_compiled(self, raws_IN: Tensor) -> tuple[Loaded, Tensor, bool]:
        """Origin and operands, the operands' squared norms, and whether the origin is finite: in one pass."""
        num_inputs, size = raws_IN.shape
        origin_N = self._workspace.buffer("origin", size * self._first, torch.float32, CPU)
        operands_JN = self._operands_buffer(num_inputs - self._first, size)
        squares_J = torch.empty(len(operands_JN), dtype=torch.float64)
        raws = raws_IN.view(torch.uint16).numpy()
        arrays = origin_N.numpy(), operands_JN.numpy(), squares_J.numpy()
        base_square = kernels.load_bfloat16(
            raws[: self._first].reshape(-1), raws[self._first :], self._subtracts, *arrays
        )
        is_finite = math.isfinite(base_square) or bool(torch.isfinite(origin_N).all())
        loaded = Loaded(origin_N if self._first else None, operands_JN)
        return loaded, exact_where_needed(squares_J, operands_JN), is_finite

    def _origin(self, raws_IN: Tensor) -> Tensor | None:
        if not self._first:
            return None
        size, dtype = raws_IN.shape[1], wide_dtype(self._dtype)
        return self._workspace.buffer("origin", size, dtype, self._device).copy_(raws_IN[0])

    def _operands(self, origin_N: Tensor | None, raws_JN: Tensor) -> Tensor:
        operands_JN = self._operands_buffer(*raws_JN.shape)
        if origin_N is None or not self._subtracts:
            return operands_JN.copy_(raws_JN)
        if origin_N.dtype == torch.float32:
            return operands_JN.copy_(raws_JN).sub_(origin_N)
        return operands_JN.copy_(raws_JN.to(origin_N) - origin_N)

    def _operands_buffer(self, num_targets: int, size: int) -> Tensor:
        flat = self._workspace.buffer("operands", num_targets * size, torch.float32, self._device)
        return flat.view(num_targets, size)

    def _refuse(self, raws_IN: Tensor) -> None:
        labels = input_labels(self._plan.inputs)
        spoilt = [label for label, raw_N in zip(labels, raws_IN, strict=True) if not bool(torch.isfinite(raw_N).all())]
        if spoilt:
            raise NotFiniteError([not_finite(label, self._inputs.name) for label in spoilt])
        raise UserError(
            f"'{self._inputs.name}': differences from the base overflow float32: do the models belong together?"
        )


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What tensors of a dtype are computed in: float32 or better."""
    return torch.float64 if dtype == torch.float64 else torch.float32
