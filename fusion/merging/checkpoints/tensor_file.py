"""One safetensors file: its header, and tensors read and written in place at their offsets.

Format: https://huggingface.co/docs/safetensors - 8 bytes header length, the header as JSON, the tensors' bytes.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor

from fusion.config import UserError
from fusion.merging.deltas import block_length

LENGTH_BYTES = 8
LONGEST_HEADER = 100_000_000
LONGEST_REASON = 200
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorSpec:
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


class TensorHome(Protocol):
    """Where a tensor is read: a file of safetensors, or something computed from some."""

    @property
    def path(self) -> Path: ...

    @property
    def specs(self) -> Mapping[str, TensorSpec]: ...

    def read(self, name: str) -> Tensor: ...

    def read_span(self, name: str, start: int, into_N: Tensor) -> None: ...

    def end(self, name: str) -> int:
        """Offset in the file at `path` up to which the tensor has it read from the beginning."""
        ...


@dataclass(frozen=True)
class TensorFile:
    """A file's header: `preamble` is its bytes up to the data; `starts` are offsets from the beginning of the file."""

    path: Path
    preamble: bytes
    specs: dict[str, TensorSpec]
    starts: dict[str, int]
    is_output: bool = False

    @cached_property
    def _file(self) -> BinaryIO:
        """Opened once; positions are given with every read and write, so threads may share it."""
        return self.path.open("r+b" if self.is_output else "rb", buffering=0)

    def read(self, name: str) -> Tensor:
        tensor = torch.empty(self.specs[name].num_elements, dtype=self.specs[name].dtype)
        self.read_span(name, 0, tensor)
        return tensor.reshape(self.specs[name].shape)

    def read_span(self, name: str, start: int, into_N: Tensor) -> None:
        """Fill `into_N` with the elements from `start` on.

        Raises:
            UserError: the file has become shorter since it was opened.
        """
        offset, missing = self._offset(name, start), _bytes_of(into_N)
        while missing:
            num_bytes = os.preadv(self._file.fileno(), (missing,), offset)
            if not num_bytes:
                raise UserError(f"{self.path}: '{name}' ends early: the file was changed while it was read")
            offset, missing = offset + num_bytes, missing[num_bytes:]

    def write_span(self, name: str, start: int, values_N: Tensor) -> None:
        """Write elements from `start` on."""
        assert values_N.dtype == self.specs[name].dtype
        offset, missing = self._offset(name, start), _bytes_of(values_N)
        while missing:
            num_bytes = os.pwrite(self._file.fileno(), missing, offset)
            offset, missing = offset + num_bytes, missing[num_bytes:]

    def _offset(self, name: str, start: int) -> int:
        return self.starts[name] + start * self.specs[name].dtype.itemsize

    def layout_at(self, path: Path) -> "TensorFile":
        """The same tensors at the same places of another file, which may be written to."""
        return TensorFile(path, self.preamble, self.specs, self.starts, is_output=True)

    def create(self) -> None:
        """Make the file, in its full size, with the header and without the tensors."""
        with self.path.open("wb") as file:
            file.write(self.preamble)
            file.truncate(self.num_bytes)

    @property
    def num_bytes(self) -> int:
        """Size of the whole file."""
        return len(self.preamble) + sum(spec.num_bytes for spec in self.specs.values())

    def end(self, name: str) -> int:
        """Offset behind a tensor."""
        return self.starts[name] + self.specs[name].num_bytes

    def flush(self) -> None:
        """Return when everything that was written is on the disk."""
        os.fsync(self._file.fileno())


def read_whole(home: TensorHome, name: str) -> Tensor:
    """All elements of a tensor that has to be computed, in the blocks in which a merge reads them."""
    spec = home.specs[name]
    tensor_N = torch.empty(spec.num_elements, dtype=spec.dtype)
    step = block_length(spec.shape)
    for start in range(0, len(tensor_N), step):
        home.read_span(name, start, tensor_N[start : start + step])
    return tensor_N.reshape(spec.shape)


def _bytes_of(values_N: Tensor) -> memoryview:
    return values_N.view(torch.uint8).numpy().data


def open_tensor_file(path: Path) -> TensorFile:
    """Read and check the header of `path`.

    Raises:
        UserError: not a safetensors file, truncated, corrupt, or of a tensor type that torch does not have.
    """
    preamble = _preamble(path)
    try:
        entries = json.loads(preamble[LENGTH_BYTES:])
        entries.pop("__metadata__", None)
        specs, ends = {}, {}
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            specs[name] = TensorSpec(DTYPES[entry["dtype"]], tuple(map(_size, entry["shape"])))
            ends[name] = tuple(map(_size, entry["data_offsets"]))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path}: the header is corrupt or names an unknown tensor type ({short_reason(error)}): "
            "fetch the file again"
        ) from error
    _check_offsets(path, len(preamble), specs, ends)
    return TensorFile(path, preamble, specs, {name: len(preamble) + start for name, (start, _) in ends.items()})


def new_tensor_file(path: Path, specs: Mapping[str, TensorSpec]) -> TensorFile:
    """The header of a file that is to hold these tensors.

    They keep their order if every one then begins at a multiple of its type's width, as readers that map the file want
    it; otherwise wide types come first.
    """
    ordered = dict(specs)
    starts = _starts(ordered)
    if any(starts[name] % spec.dtype.itemsize for name, spec in ordered.items()):
        ordered = dict(sorted(specs.items(), key=lambda item: -item[1].dtype.itemsize))
        starts = _starts(ordered)
    names = {dtype: name for name, dtype in DTYPES.items()}
    entries = {
        name: {
            "dtype": names[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [starts[name], starts[name] + spec.num_bytes],
        }
        for name, spec in ordered.items()
    }
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
    header = header.ljust(len(header) + -len(header) % LENGTH_BYTES)
    preamble = len(header).to_bytes(LENGTH_BYTES, "little") + header
    return TensorFile(path, preamble, ordered, {name: len(preamble) + start for name, start in starts.items()})


def _starts(specs: Mapping[str, TensorSpec]) -> dict[str, int]:
    """Where each tensor begins behind the header when they lie one behind the other."""
    return dict(zip(specs, accumulate((spec.num_bytes for spec in specs.values()), initial=0), strict=False))


def short_reason(error: Exception) -> str:
    """What an error says; some of them quote the whole file."""
    text = repr(error)
    return text if len(text) < LONGEST_REASON else f"{text[:LONGEST_REASON]}..."


def _size(value: Any) -> int:
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is no size")
    return value


def _preamble(path: Path) -> bytes:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        if not 2 <= length <= min(LONGEST_HEADER, path.stat().st_size - LENGTH_BYTES):
            raise UserError(f"{path}: not a safetensors file, or truncated within its header: fetch the file again")
        file.seek(0)
        return file.read(LENGTH_BYTES + length)


def _check_offsets(
    path: Path, data_start: int, specs: dict[str, TensorSpec], ends: dict[str, tuple[int, ...]]
) -> None:
    """The tensors must fill the data without gap or overlap, as the format demands, and the file must hold them."""
    position = 0
    for name, spec in specs.items():
        if ends[name] != (position, position + spec.num_bytes):
            raise UserError(f"{path}: the offsets of '{name}' are corrupt: fetch the file again")
        position += spec.num_bytes
    held = path.stat().st_size - data_start
    if held != position:
        raise UserError(f"{path}: truncated or corrupt, {held:,} bytes of {position:,}: fetch the file again")
