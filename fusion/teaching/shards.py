"""Shards: rows of many dialogues as checked blocks of bytes, found by content hash, memory-mapped.

A folder of `shard-NUMBER.safetensors` and, once finished, `index.json`. A shard holds blocks, a block whole dialogues;
what the bytes of a block mean is its store's business. Every byte is covered by a checksum: blocks and tables by
CRC-32 when they are read, files by SHA-256 and the index by itself when a store is verified.
Array legend: D dialogues of a shard, B blocks.
"""

import json
import zlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as save_arrays

from fusion.cache import canonical_json, file_hash, write_bytes, write_text
from fusion.config import UserError

INDEX = "index.json"
OPEN_SHARDS = 64
"""Shards that stay mapped: a large store has more shards than a process may hold files."""
TABLES = ("content_hash_D", "rows_D", "block_dialogues_B", "block_bytes_B", "shared")
"""Arrays of a shard beside its blocks, in the order of their common checksum."""


@dataclass(frozen=True)
class Block:
    """Consecutive dialogues of a shard that are read together."""

    names: Sequence[str]
    """Content hashes."""
    rows: Sequence[int]
    """Rows of every dialogue."""
    data: bytes


class Place(NamedTuple):
    """Where the rows of a dialogue are."""

    shard: int
    """Place of its shard in the index."""
    block: int
    position: int
    """Place of the dialogue in its block."""


@dataclass(frozen=True)
class ShardEntry:
    """What the index says of a shard."""

    file: str
    sha256: str
    bytes: int
    rows: int
    dialogues: list[str]


@dataclass(frozen=True)
class Index:
    description: dict[str, Any]
    shards: list[ShardEntry]


def shard_name(number: int) -> str:
    return f"shard-{number:06d}.safetensors"


def has_shard(folder: Path, number: int) -> bool:
    return (folder / shard_name(number)).is_file()


def write_shard(folder: Path, number: int, blocks: Sequence[Block], shared: bytes = b"") -> None:
    """Write shard `number` atomically; `shared` are bytes that every block needs for its decoding.

    Raises:
        UserError: a dialogue has no row, or comes twice.
    """
    names = [name for block in blocks for name in block.names]
    rows = [count for block in blocks for count in block.rows]
    check_dialogues(folder, number, names, rows)
    tables: dict[str, np.ndarray] = {
        "content_hash_D": np.frombuffer(bytes.fromhex("".join(names)), dtype=np.uint8).reshape(len(names), -1),
        "rows_D": np.asarray(rows, dtype=np.int64),
        "block_dialogues_B": np.asarray([len(block.names) for block in blocks], dtype=np.int64),
        "block_bytes_B": np.asarray([len(block.data) for block in blocks], dtype=np.int64),
        "shared": np.frombuffer(shared, dtype=np.uint8),
    }
    checksums = [_tables_checksum(tables), *(zlib.crc32(block.data) for block in blocks)]
    blob = np.frombuffer(b"".join(block.data for block in blocks), dtype=np.uint8)
    arrays = {**tables, "checksums": np.asarray(checksums, dtype=np.uint32), "blocks": blob}
    write_bytes(folder / shard_name(number), save_arrays(arrays))


def check_dialogues(folder: Path, number: int, names: Sequence[str], rows: Sequence[int]) -> None:
    """UserError when shard `number` cannot hold these dialogues: there are none, one has no row, or comes twice."""
    problems = [f"dialogue {name} has no supervised row" for name, count in zip(names, rows, strict=True) if not count]
    problems += [f"dialogue {name} comes {count} times" for name, count in Counter(names).items() if count > 1]
    problems += [] if names else ["there are no dialogues to write"]
    if problems:
        raise UserError(f"{folder / shard_name(number)}: {'; '.join(problems)}")


def finish(folder: Path, description: Mapping[str, object]) -> None:
    """Write the index over all shards of `folder`; shards are hashed as streams and only their tables are read.

    Raises:
        UserError: there are no shards, a dialogue is in two of them, or one is damaged.
    """
    entries: list[ShardEntry] = []
    for path in sorted(folder.glob("shard-*.safetensors")):
        shard = Shard.open(path)
        size, rows = path.stat().st_size, int(sum(shard.rows))
        entries.append(ShardEntry(path.name, file_hash(path), size, rows, shard.names))
    counts = Counter(name for entry in entries for name in entry.dialogues)
    twice = sorted(name for name, count in counts.items() if count > 1)
    if twice:
        raise UserError(f"{folder}: dialogues in two shards: {', '.join(twice)}; delete the folder to make it again")
    if not entries:
        raise UserError(f"{folder}: there are no shards to finish")
    write_text(folder / INDEX, _index_text({"description": dict(description), "shards": entries}))


def read_index(folder: Path) -> Index:
    """The index of a finished folder.

    Raises:
        UserError: there is none, or its bytes are not what was written.
    """
    path = folder / INDEX
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UserError(f"{folder}: this store is not finished (its {INDEX} is missing)") from error
    try:
        content = json.loads(text)
        content.pop("checksum")
        intact = text == _index_text(content).encode("utf-8")
        index = Index(content["description"], [ShardEntry(**entry) for entry in content["shards"]])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: the index is damaged ({error}); delete {folder} to make it again") from error
    if not intact:
        raise UserError(f"{path}: the index is damaged (its checksum differs); delete {folder} to make it again")
    return index


def verify(folder: Path) -> list[str]:
    """Re-hash index and shards; one sentence per file that is missing, damaged or unknown to the index."""
    try:
        index = read_index(folder)
    except UserError as error:
        return [str(error)]
    known = {entry.file for entry in index.shards}
    strangers = sorted(path for path in folder.glob("shard-*.safetensors") if path.name not in known)
    problems = [problem for entry in index.shards if (problem := _problem(folder / entry.file, entry))]
    return problems + [f"{path}: the index does not know this shard" for path in strangers]


def _problem(path: Path, entry: ShardEntry) -> str:
    if not path.is_file():
        return f"{path}: the shard is missing"
    size = path.stat().st_size
    if size < entry.bytes:
        return f"{path}: the shard is truncated, it has {size} of {entry.bytes} bytes"
    if size > entry.bytes or file_hash(path) != entry.sha256:
        return f"{path}: the shard is damaged, its bytes are not what the index says"
    return ""


def _index_text(content: Mapping[str, object]) -> str:
    digest = sha256(canonical_json(content).encode("utf-8")).hexdigest()
    return canonical_json({**content, "checksum": digest}) + "\n"


def _tables_checksum(tables: Mapping[str, np.ndarray]) -> int:
    checksum = 0
    for name in TABLES:
        checksum = zlib.crc32(np.ascontiguousarray(tables[name]).data, checksum)
    return checksum


@dataclass(frozen=True)
class Shard:
    """One mapped shard."""

    path: Path
    names: list[str]
    """Content hashes, in the order of the blocks."""
    rows: list[int]
    """Rows of every dialogue."""
    first: list[int]
    """Place of every block's first dialogue, and the number of dialogues."""
    starts: list[int]
    """Byte at which every block begins, and the number of bytes."""
    checksums: list[int]
    """CRC-32 of every block."""
    shared: bytes
    blocks: Any = field(repr=False)
    """safetensors' handle, for slices."""

    @classmethod
    def open(cls, path: Path) -> "Shard":
        """Map a shard and read its tables.

        Raises:
            UserError: it is missing or damaged.
        """
        try:
            file = safe_open(path, framework="numpy")
            tables = {name: file.get_tensor(name) for name in TABLES}
            checksums = file.get_tensor("checksums").tolist()
            blocks = file.get_slice("blocks")
        except (OSError, SafetensorError) as error:
            raise _damaged(path, str(error)) from error
        if _tables_checksum(tables) != checksums[0]:
            raise _damaged(path, "the checksum of its tables differs")
        return cls(
            path,
            [row.tobytes().hex() for row in tables["content_hash_D"]],
            tables["rows_D"].tolist(),
            list(accumulate(tables["block_dialogues_B"].tolist(), initial=0)),
            list(accumulate(tables["block_bytes_B"].tolist(), initial=0)),
            checksums[1:],
            tables["shared"].tobytes(),
            blocks,
        )

    def block(self, number: int) -> np.ndarray:
        """The bytes of a block: uint8, a copy of its own.

        Raises:
            UserError: they are not what was written.
        """
        data = self.blocks[self.starts[number] : self.starts[number + 1]]
        if zlib.crc32(data.data) != self.checksums[number]:
            raise _damaged(self.path, f"the checksum of block {number} differs")
        return data

    def rows_of_block(self, number: int) -> list[int]:
        """Rows of every dialogue of a block."""
        return self.rows[self.first[number] : self.first[number + 1]]


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path}: the shard is missing or damaged ({what}); delete {path.parent} to make it again")


class ShardReader:
    """The shards of a finished folder; a few stay mapped."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError when the folder is not finished or its index is damaged."""
        self.folder = folder
        self.index = read_index(folder)
        self.shard = lru_cache(OPEN_SHARDS)(self._open)
        self._where = {
            name: (number, place)
            for number, entry in enumerate(self.index.shards)
            for place, name in enumerate(entry.dialogues)
        }

    def __reduce__(self) -> tuple[type["ShardReader"], tuple[Path]]:
        """Mapped files do not travel to another process; it opens its own."""
        return type(self), (self.folder,)

    def __len__(self) -> int:
        return len(self._where)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __contains__(self, name: object) -> bool:
        return name in self._where

    def find(self, name: str) -> Place:
        """KeyError when the store does not know the dialogue; UserError when its shard is damaged."""
        number, place = self._where[name]
        first = self.shard(number).first
        block = bisect_right(first, place) - 1
        return Place(number, block, place - first[block])

    def _open(self, number: int) -> Shard:
        entry = self.index.shards[number]
        shard = Shard.open(self.folder / entry.file)
        if shard.names != entry.dialogues:
            raise _damaged(shard.path, "it holds other dialogues than the index says")
        return shard
