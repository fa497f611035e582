"""One safetensors file: its header, and tensors read and written in place at their offsets.

Format: https://huggingface.co/docs/safetensors - 8 bytes header length, the header as JSON, the tensors' bytes.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusion.config import UserError

LENGTH_BYTES = 8
LONGEST_HEADER = 100_000_000
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
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


@dataclass(frozen=True)
class TensorFile:
    """A file's header: `preamble` is its bytes up to the data; `starts` are offsets from the beginning of the file."""

    path: Path
    preamble: bytes
    specs: dict[str, TensorSpec]
    starts: dict[str, int]

    def read(self, name: str) -> Tensor:
        spec = self.specs[name]
        if not spec.num_bytes:
            return torch.empty(spec.shape, dtype=spec.dtype)
        raw = np.fromfile(self.path, dtype=np.uint8, count=spec.num_bytes, offset=self.starts[name])
        if len(raw) != spec.num_bytes:
            raise UserError(f"{self.path}: '{name}' ends early: the file was changed while it was read")
        return torch.from_numpy(raw).view(spec.dtype).reshape(spec.shape)

    def copy_layout(self, path: Path) -> "TensorFile":
        """Create `path` with this file's header and size, its tensors still to be written."""
        num_bytes = sum(spec.num_bytes for spec in self.specs.values())
        with path.open("wb") as file:
            file.write(self.preamble)
            file.truncate(len(self.preamble) + num_bytes)
        return TensorFile(path, self.preamble, self.specs, self.starts)

    def write(self, name: str, tensor: Tensor) -> None:
        assert TensorSpec(tensor.dtype, tuple(tensor.shape)) == self.specs[name]
        with self.path.open("r+b") as file:
            file.seek(self.starts[name])
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


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
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: the header is corrupt or names an unknown tensor type ({error!r}): fetch the file again"
        ) from error
    _check_offsets(path, len(preamble), specs, ends)
    return TensorFile(path, preamble, specs, {name: len(preamble) + start for name, (start, _) in ends.items()})


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
