"""Sparse next-token distributions on the pivot's rows: what alignment writes, fusion mixes, and training reads.

Array legend: D dialogues, R rows, E entries.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from fusion.teaching import shards


@dataclass(frozen=True)
class SparseRows:
    """CSR rows: entries `indptr[r]:indptr[r + 1]` are row r; weights are probabilities, the rest to 1 is the tail."""

    indptr_R: np.ndarray
    """int64 [R + 1]."""
    ids_E: np.ndarray
    """int32 pivot token ids."""
    weights_E: np.ndarray
    """float32 probabilities."""

    def __len__(self) -> int:
        return len(self.indptr_R) - 1

    @property
    def is_empty_R(self) -> np.ndarray:
        return np.diff(self.indptr_R) == 0

    @property
    def row_of_E(self) -> np.ndarray:
        """int64 row number of every entry."""
        return np.repeat(np.arange(len(self)), np.diff(self.indptr_R))

    def padded(self, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Dense (ids_RK int64, weights_RK float32) with `width` columns; unused columns have id 0 and weight 0."""
        ids = np.zeros((len(self), width), dtype=np.int64)
        weights = np.zeros((len(self), width), dtype=np.float32)
        rows = self.row_of_E
        columns = np.arange(len(rows)) - self.indptr_R[rows]
        ids[rows, columns], weights[rows, columns] = self.ids_E, self.weights_E
        return ids, weights


def gather_entries(row_E: np.ndarray, ids_E: np.ndarray, weights_E: np.ndarray, num_rows: int) -> SparseRows:
    """`loose_rows`, each row scaled to 1."""
    indptr, row_E, ids_E, weights_E = _united(row_E, ids_E, weights_E, num_rows)
    return SparseRows(indptr, ids_E, _shares(row_E, weights_E, num_rows))


def loose_rows(row_E: np.ndarray, ids_E: np.ndarray, weights_E: np.ndarray, num_rows: int) -> SparseRows:
    """Rows from loose entries: the masses of equal ids of a row are summed, ids ascend.

    Entries without mass go; a row without mass is empty.
    """
    indptr, _, ids_E, weights_E = _united(row_E, ids_E, weights_E, num_rows)
    return SparseRows(indptr, ids_E, weights_E.astype(np.float32))


def scaled(rows: SparseRows) -> SparseRows:
    """`rows` with every row that is not empty scaled to 1."""
    return replace(rows, weights_E=_shares(rows.row_of_E, rows.weights_E.astype(np.float64), len(rows)))


def _united(
    row_E: np.ndarray, ids_E: np.ndarray, weights_E: np.ndarray, num_rows: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(indptr_R, row_E, ids_E, mass_E float64) of entries with mass, one per row and id, in order."""
    kept = weights_E > 0
    row_E, ids_E, weights_E = row_E[kept], ids_E[kept], weights_E[kept].astype(np.float64)
    keys, inverse = np.unique(row_E.astype(np.int64) << 32 | ids_E.astype(np.int64), return_inverse=True)
    mass = np.bincount(inverse, weights=weights_E, minlength=len(keys))
    rows = keys >> 32
    indptr = np.concatenate(([0], np.cumsum(np.bincount(rows, minlength=num_rows)))).astype(np.int64)
    return indptr, rows, (keys & 0xFFFFFFFF).astype(np.int32), mass


def _shares(row_E: np.ndarray, weights_E: np.ndarray, num_rows: int) -> np.ndarray:
    """float32: every weight as a share of its row's sum."""
    return (weights_E / np.bincount(row_E, weights=weights_E, minlength=num_rows)[row_E]).astype(np.float32)


class SparseRowStore(Mapping[str, SparseRows]):
    """Memory-mapped sparse rows of many dialogues, found by content hash.

    Shards are appended in any order, by any process; each appears whole or not at all. A shard lists its dialogues in
    the order of their hashes, so equal rows are equal bytes. Nothing is read before the first question.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @staticmethod
    def write(folder: Path, dialogues: Mapping[str, SparseRows]) -> None:
        """Write the rows of `dialogues` (content hash -> rows) into `folder` at once: one shard, finished."""
        SparseRowStore.append(folder, 0, dialogues)
        SparseRowStore.finish(folder)

    @staticmethod
    def has_shard(folder: Path, number: int) -> bool:
        return shards.has_shard(folder, number)

    @staticmethod
    def append(folder: Path, number: int, rows: Mapping[str, SparseRows]) -> None:
        """Write shard `number` atomically; UserError when there are no dialogues, or one has no row."""
        blocks = [shards.Block([name], [len(rows[name])], _to_bytes(rows[name])) for name in sorted(rows)]
        shards.write_shard(folder, number, blocks)

    @staticmethod
    def finish(folder: Path) -> None:
        """Write the index over all shards that are there; only then can the store be read."""
        shards.finish(folder, {"what": "sparse rows"})

    def verify(self) -> list[str]:
        """Re-hash everything; one sentence per file that is missing, truncated or damaged."""
        return shards.verify(self.folder)

    @cached_property
    def _shards(self) -> shards.ShardReader:
        return shards.ShardReader(self.folder)

    def __len__(self) -> int:
        return len(self._shards)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shards)

    def __contains__(self, content_hash: object) -> bool:
        return content_hash in self._shards

    def __getitem__(self, content_hash: str) -> SparseRows:
        """The rows of a dialogue; UserError when their bytes are damaged."""
        place = self._shards.find(content_hash)
        shard = self._shards.shard(place.shard)
        return _from_bytes(shard.block(place.block), shard.rows_of_block(place.block)[0])


def _to_bytes(rows: SparseRows) -> bytes:
    """Entries of every row, ids, probabilities: 4 bytes each."""
    columns = (np.diff(rows.indptr_R).astype("<u4"), rows.ids_E.astype("<i4"), rows.weights_E.astype("<f4"))
    return b"".join(column.tobytes() for column in columns)


def _from_bytes(data: np.ndarray, num_rows: int) -> SparseRows:
    numbers = data.view("<i4")
    middle = num_rows + (len(numbers) - num_rows) // 2
    indptr = np.zeros(num_rows + 1, dtype=np.int64)
    np.cumsum(numbers[:num_rows], out=indptr[1:])
    return SparseRows(indptr, numbers[num_rows:middle], numbers[middle:].view("<f4"))
