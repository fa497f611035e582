"""The blocks of one tensor, read from files or memory: the base and the deltas of the targets.

Shapes: J targets, N elements of a block.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fusion.config import UserError, raise_problems
from fusion.merging.arithmetic import squared_norms
from fusion.merging.checkpoint import Checkpoint
from fusion.merging.deltas import Loaded, Run, block_length
from fusion.merging.plan import MergePlan, State, input_labels
from fusion.merging.statistics import WATCH_EVERY, BlockStatistics
from fusion.merging.tensor_file import TensorFile

CPU = torch.device("cpu")


class Workspace(threading.local):
    """Buffers of one thread, used again and again: new memory costs more than what is done with it."""

    def __init__(self) -> None:
        self._buffers: dict[object, Tensor] = {}

    def buffer(self, name: object, num_elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Unset elements [num_elements]; what the same `name` gave before is overwritten."""
        held = self._buffers.get(name)
        if held is None or held.dtype != dtype or len(held) < num_elements or held.device != device:
            self._buffers[name] = held = torch.empty(num_elements, dtype=dtype, device=device)
        return held[:num_elements]


class Reader(Protocol):
    """Reads elements of one tensor of one input."""

    def read(self, start: int, stop: int, into: Tensor) -> Tensor:
        """The elements [stop - start] in their own dtype; `into` is memory of that size which may be used for it."""


@dataclass(frozen=True)
class FileReader:
    file: TensorFile
    name: str

    def read(self, start: int, stop: int, into: Tensor) -> Tensor:
        self.file.read_span(self.name, start, into)
        return into


@dataclass(frozen=True)
class TensorReader:
    """Of a tensor in memory, flattened."""

    tensor_N: Tensor

    def read(self, start: int, stop: int, into: Tensor) -> Tensor:
        return self.tensor_N[start:stop].cpu()


def reader_of(state: State, name: str) -> Reader:
    if isinstance(state, Checkpoint):
        return FileReader(state.homes[name], name)
    return TensorReader(state[name].detach().reshape(-1))


class TensorOperands:
    """Base and targets of one tensor, widened to float32 (float64 tensors: subtracted in float64 before that).

    Every block is looked at once, when it is first loaded: its statistics are taken, and NaN or infinities refused.
    """

    def __init__(
        self, plan: MergePlan, name: str, workspace: Workspace, device: torch.device, keep_bytes: int
    ) -> None:
        spec = plan.specs[name]
        self._plan, self._name, self._workspace, self._device = plan, name, workspace, device
        self._dtype, self._length, self._num_elements = spec.dtype, block_length(spec.shape), spec.num_elements
        self._readers = [reader_of(state, name) for state in plan.inputs.values()]
        from_files = any(isinstance(reader, FileReader) for reader in self._readers)
        self._keeps = from_files and len(self._readers) * spec.num_bytes <= keep_bytes
        self._arenas: list[Tensor] = []
        self._kept: dict[int, list[Tensor]] = {}
        self._whole: Tensor | None = None
        self.statistics: dict[int, BlockStatistics] = {}

    def watched(self, start: int) -> bool:
        """Whether the block that starts there is one of those that are looked at closely."""
        return start // self._length % WATCH_EVERY == 0

    def keep(self) -> None:
        if self._keeps and not self._arenas:
            self._arenas = self._buffers("kept", self._num_elements)

    def load(self, start: int, stop: int) -> Loaded:
        """The elements from `start` to before `stop`, which must be a block.

        Raises:
            UserError: an input holds NaN or infinities there.
        """
        raws = self._raws(start, stop)
        origin_N = None if self._plan.base is None else self._origin(raws[0])
        if self._whole is not None:
            return Loaded(origin_N, self._whole[:, start:stop])
        operands_JN = self._operands(origin_N, raws[-len(self._plan.targets) :])
        if start not in self.statistics:
            found = BlockStatistics.of(operands_JN, self.watched(start))
            if not bool(torch.isfinite(found.squares_J).all()) or not _is_finite(origin_N):
                self._refuse(raws)
            self.statistics[start] = found
        return Loaded(origin_N, operands_JN)

    def whole(self, run: Run) -> Tensor:
        if self._whole is None:
            whole = torch.empty(len(self._plan.targets), self._num_elements, device=self._device)

            def fill(start: int) -> None:
                stop = min(start + self._length, self._num_elements)
                whole[:, start:stop] = self.load(start, stop).operands_JN

            run(fill, range(0, self._num_elements, self._length))
            self._whole = whole
        return self._whole

    def _raws(self, start: int, stop: int) -> list[Tensor]:
        """Elements of all inputs in their own dtype, on the CPU; only the base's once all targets are held whole."""
        if start in self._kept:
            return self._kept[start]
        readers = self._readers if self._whole is None else self._readers[: -len(self._plan.targets)]
        into = [arena[start:stop] for arena in self._arenas] or self._buffers("read", stop - start)
        raws = [reader.read(start, stop, part) for reader, part in zip(readers, into, strict=False)]
        if self._arenas:
            self._kept[start] = raws
        return raws

    def _buffers(self, name: str, num_elements: int) -> list[Tensor]:
        """Memory on the CPU for so many elements of every input."""
        places = range(len(self._readers))
        return [self._workspace.buffer((name, place), num_elements, self._dtype, CPU) for place in places]

    def _origin(self, raw_N: Tensor) -> Tensor:
        origin_N = self._workspace.buffer("origin", len(raw_N), wide_dtype(self._dtype), self._device)
        return origin_N.copy_(raw_N)

    def _operands(self, origin_N: Tensor | None, raws: Sequence[Tensor]) -> Tensor:
        size = len(raws) * len(raws[0])
        operands_JN = self._workspace.buffer("operands", size, torch.float32, self._device).view(len(raws), -1)
        subtrahend_N = origin_N if self._plan.method.operands == "deltas" else None
        for operands_N, raw_N in zip(operands_JN, raws, strict=True):
            if subtrahend_N is None:
                operands_N.copy_(raw_N)
            elif subtrahend_N.dtype == torch.float32:
                operands_N.copy_(raw_N).sub_(subtrahend_N)
            else:
                operands_N.copy_(raw_N.to(subtrahend_N) - subtrahend_N)
        return operands_JN

    def _refuse(self, raws: Sequence[Tensor]) -> None:
        labels = input_labels(self._plan.inputs)
        spoilt = [label for label, raw_N in zip(labels, raws, strict=True) if not bool(torch.isfinite(raw_N).all())]
        raise_problems(
            [f"{label}: '{self._name}' holds NaN or infinities: merging would spread them" for label in spoilt]
        )
        raise UserError(f"'{self._name}': differences from the base overflow float32: do the models belong together?")


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What tensors of a dtype are computed in: float32 or better."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _is_finite(origin_N: Tensor | None) -> bool:
    return origin_N is None or bool(torch.isfinite(squared_norms(origin_N[None])).all())
