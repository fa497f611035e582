"""The distribution store: next-token distributions of supervised rows, found by content hash.

`compact` keeps some 20 bytes a row (`fusion.teaching.compact`), `exact` the 32-bit numbers (`fusion.teaching.exact`);
files, checksums and the index are those of `fusion.teaching.shards`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import numpy as np

from fusion.config import UserError
from fusion.teaching import shards
from fusion.teaching.compact import Compact
from fusion.teaching.exact import Exact
from fusion.teaching.teacher_rows import TeacherRows

__all__ = ["DistributionStore", "TeacherRows"]

DECODED_BLOCKS = 32
"""Blocks that stay decoded, some 100 kB each: dialogues that are read in the store's order are decoded once."""


class Coding(Protocol):
    """How the dialogues of one shard become bytes."""

    name: ClassVar[str]
    block_rows: ClassVar[int]

    @classmethod
    def of(cls, dialogues: Sequence[TeacherRows]) -> Self: ...

    @classmethod
    def from_bytes(cls, shared: bytes) -> Self: ...

    def to_bytes(self) -> bytes: ...

    def encode(self, dialogues: Sequence[TeacherRows]) -> bytes: ...

    def decode(self, data: np.ndarray, num_rows: Sequence[int]) -> list[TeacherRows]: ...

    def parts(self, data: np.ndarray, num_rows: Sequence[int]) -> dict[str, int]: ...


CODINGS: dict[str, type[Coding]] = {coding.name: coding for coding in (Compact, Exact)}


class DistributionStore:
    """A folder of shards and, once finished, an index with their checksums.

    A shard appears whole or not at all, and its bytes depend on its dialogues only: writers may append shards in any
    order and from several processes, and a killed pass goes on where it stopped. Readers ask by content hash.
    """

    def __init__(self, folder: Path, coding: str = Compact.name) -> None:
        """A store to append to: `coding` is compact or exact. To read, use `open`."""
        self.folder = folder
        self._coding = CODINGS[coding]
        self._block = lru_cache(DECODED_BLOCKS)(self._decoded)

    @classmethod
    def open(cls, folder: Path) -> "DistributionStore":
        """Open a finished store for reading; UserError when there is none, or when its index is damaged."""
        if not (folder / shards.INDEX).is_file():
            raise UserError(f"{folder}: no finished distribution store (its {shards.INDEX} is missing)")
        reader = shards.ShardReader(folder)
        coding = reader.index.description.get("store")
        if coding not in CODINGS:
            raise UserError(
                f"{folder}: this is no distribution store (its {shards.INDEX} names the coding {coding!r})"
            )
        store = cls(folder, coding)
        store._reader = reader
        return store

    def __reduce__(self) -> tuple[type["DistributionStore"], tuple[Path, str]]:
        """Mapped files and decoded blocks do not travel to another process."""
        return type(self), (self.folder, self._coding.name)

    def has_shard(self, number: int) -> bool:
        return shards.has_shard(self.folder, number)

    def append(self, number: int, content_hashes: Sequence[str], rows: Sequence[TeacherRows]) -> None:
        """Write shard `number` atomically: the rows of one or more dialogues.

        Raises:
            UserError: a dialogue has no rows, or comes twice.
            ValueError: rows that are no distributions (compact only).
        """
        num_rows = [len(one.nll_R) for one in rows]
        shards.check_dialogues(self.folder, number, content_hashes, num_rows)
        coding = self._coding.of(rows)
        blocks = [
            shards.Block(content_hashes[a:b], num_rows[a:b], coding.encode(rows[a:b]))
            for a, b in _runs(num_rows, coding.block_rows)
        ]
        shards.write_shard(self.folder, number, blocks, coding.to_bytes())

    def finish(self, description: Mapping[str, object]) -> None:
        """Write the index over all shards; `description` says what made them (model, top_k, temperature)."""
        shards.finish(self.folder, {**description, "store": self._coding.name})

    def verify(self) -> list[str]:
        """Re-hash index and shards; one sentence per file that is missing, truncated, damaged or unknown."""
        return shards.verify(self.folder)

    @property
    def description(self) -> dict[str, Any]:
        """What was said of the store when it was finished."""
        return self._reader.index.description

    @property
    def num_rows(self) -> int:
        return sum(entry.rows for entry in self._reader.index.shards)

    def __len__(self) -> int:
        return len(self._reader)

    def __contains__(self, content_hash: object) -> bool:
        return content_hash in self._reader

    def __iter__(self) -> Iterator[str]:
        """Content hashes in the order in which they are read fastest."""
        return iter(self._reader)

    def __getitem__(self, content_hash: str) -> TeacherRows:
        """The rows of a dialogue, arrays of the caller's own; UserError when their bytes are damaged."""
        place = self._reader.find(content_hash)
        rows = self._block(place.shard, place.block)[place.position]
        return replace(
            rows,
            ids_RK=rows.ids_RK.copy(),
            logprobs_RK=rows.logprobs_RK.copy(),
            tail_R=rows.tail_R.copy(),
            nll_R=rows.nll_R.copy(),
        )

    def parts(self) -> dict[str, int]:
        """Bytes of the finished store by what they say; `tables` are names, checksums and the index."""
        sizes: dict[str, int] = {}
        for number in range(len(self._reader.index.shards)):
            shard = self._reader.shard(number)
            for block in range(len(shard.checksums)):
                for name, size in self._coder(number).parts(shard.block(block), shard.rows_of_block(block)).items():
                    sizes[name] = sizes.get(name, 0) + size
            sizes["shared"] = sizes.get("shared", 0) + len(shard.shared)
        return {**sizes, "tables": self.num_bytes - sum(sizes.values())}

    @property
    def num_bytes(self) -> int:
        """Bytes of the shards and the index on the disk."""
        index = (self.folder / shards.INDEX).stat().st_size
        return index + sum(entry.bytes for entry in self._reader.index.shards)

    @cached_property
    def _reader(self) -> shards.ShardReader:
        return shards.ShardReader(self.folder)

    @cached_property
    def _coders(self) -> dict[int, Coding]:
        return {}

    def _coder(self, number: int) -> Coding:
        if number not in self._coders:
            self._coders[number] = self._coding.from_bytes(self._reader.shard(number).shared)
        return self._coders[number]

    def _decoded(self, number: int, block: int) -> list[TeacherRows]:
        shard = self._reader.shard(number)
        return self._coder(number).decode(shard.block(block), shard.rows_of_block(block))


def _runs(num_rows: Sequence[int], block_rows: int) -> Iterator[tuple[int, int]]:
    """Bounds of runs of dialogues that hold `block_rows` rows, the last one excepted."""
    start, held = 0, 0
    for place, total in enumerate(accumulate(num_rows), 1):
        if total - held >= block_rows or place == len(num_rows):
            yield start, place
            start, held = place, total
