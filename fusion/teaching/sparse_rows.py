"""Sparse next-token distributions on the pivot's rows: what alignment writes, fusion mixes, and training reads.

Array legend: D dialogues, R rows, E entries.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class SparseRows:
    """CSR rows: entries `indptr[r]:indptr[r + 1]` are row r; the weights are probabilities, the rest to 1 is the tail."""

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
    """Memory-mapped sparse rows of many dialogues, found by content hash."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @staticmethod
    def write(folder: Path, dialogues: Mapping[str, SparseRows]) -> None:
        """Write the rows of `dialogues` (content hash -> rows) into `folder`, in the order of their hashes."""
        assert dialogues, "there are no dialogues to write"
        names = sorted(dialogues)
        rows = [dialogues[name] for name in names]
        arrays = {
            "content_hash": np.frombuffer(bytes.fromhex("".join(names)), dtype=np.uint8).reshape(len(names), -1),
            "dialogue_indptr": np.cumsum([0, *(len(row) for row in rows)]),
            "row_indptr": np.concatenate(([0], np.cumsum(np.concatenate([np.diff(row.indptr_R) for row in rows])))),
            "ids": np.concatenate([row.ids_E for row in rows]),
            "weights": np.concatenate([row.weights_E for row in rows]),
        }
        for name, array in arrays.items():
            np.save(folder / f"{name}.npy", array)

    def _array(self, name: str) -> np.ndarray:
        return np.load(self.folder / f"{name}.npy", mmap_mode="r")

    @cached_property
    def _arrays(self) -> dict[str, np.ndarray]:
        return {name: self._array(name) for name in ("dialogue_indptr", "row_indptr", "ids", "weights")}

    @cached_property
    def _where(self) -> dict[str, int]:
        return {row.tobytes().hex(): position for position, row in enumerate(self._array("content_hash"))}

    def __len__(self) -> int:
        return len(self._where)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __getitem__(self, content_hash: str) -> SparseRows:
        arrays, position = self._arrays, self._where[content_hash]
        first, last = arrays["dialogue_indptr"][position], arrays["dialogue_indptr"][position + 1]
        indptr = np.asarray(arrays["row_indptr"][first : last + 1])
        entries = slice(int(indptr[0]), int(indptr[-1]))
        return SparseRows(
            indptr - indptr[0], np.asarray(arrays["ids"][entries]), np.asarray(arrays["weights"][entries])
        )
