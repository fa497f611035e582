"""Reads the file of an offline W&B run: a LevelDB log (blocks of 32 KiB, records in pieces) of protobuf records."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

BLOCK = 1 << 15
FILE_HEADER, PIECE_HEADER = 7, 7
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records(run: Path) -> list[Any]:
    """The records in the folder of an offline run."""
    (file,) = run.glob("run-*.wandb")
    return [wandb_internal_pb2.Record.FromString(one) for one in _payloads(file.read_bytes())]


def _payloads(data: bytes) -> Iterator[bytes]:
    position, pieces = FILE_HEADER, b""
    while position + PIECE_HEADER <= len(data):
        if BLOCK - position % BLOCK < PIECE_HEADER:  # too little of the block is left for a header
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + PIECE_HEADER])
        position += PIECE_HEADER
        pieces += data[position : position + length]
        position += length
        if kind in (WHOLE, LAST):
            yield pieces
            pieces = b""


def values(items: Any) -> dict[str, Any]:
    """Key -> value of a history, a summary or a config."""
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
