"""Mapping statistics: how often a pivot token stands where a source token stands, over a corpus.

Sparse counts, since a dense pivot x source matrix of two ordinary vocabularies takes tens of gigabytes.
Legend: P distinct pairs of (pivot id, source id).
"""

import io
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import ArrayLike

from fusion.alignment.dtw import dtw_path
from fusion.alignment.pieces import Pieces
from fusion.alignment.rows import Rows, boundary_rows
from fusion.alignment.vocabularies import VocabularyPair
from fusion.cache import write_bytes
from fusion.config import UserError, raise_problems
from fusion.dialogues.token_bytes import TokenBytes

PATHS = ("bytes", "dtw")
FIELD_BITS = 32
FIELD_MASK = (1 << FIELD_BITS) - 1
PENDING_LIMIT = 1 << 20


class MappingStatistics:
    """Counts of (pivot id, source id).

    `path="bytes"` counts the pairs that start at the same byte of the text, if the bytes of one begin with the bytes
    of the other. All pairs do, but those with an event or a dummy prefix (two ends of turn count as equal).
    `path="dtw"` counts, as the authors' code, each distinct source id on the published path at each pivot position.
    """

    def __init__(
        self,
        pivot_tokenizer: Any,
        source_tokenizer: Any,
        path: str = "bytes",
        *,
        pivot_end_of_turn: int | None = None,
        source_end_of_turn: int | None = None,
    ) -> None:
        """Raises UserError for an unknown path or a tokeniser without a byte table."""
        if path not in PATHS:
            raise UserError(f"mapping statistics: path={path!r} is not known; choose one of {', '.join(PATHS)}")
        self.path = path
        self.pair = VocabularyPair.of(pivot_tokenizer, source_tokenizer, pivot_end_of_turn, source_end_of_turn)
        self._pivot_pieces, self._source_pieces = Pieces(pivot_tokenizer), Pieces(source_tokenizer)
        self._keys, self._counts = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        self._pending: list[np.ndarray] = []
        self._num_pending = 0

    def add(self, pivot_ids: ArrayLike, source_ids: ArrayLike) -> None:
        """Count one dialogue, given as two whole token sequences of the same text."""
        self.add_rows(*self.pair.rows(pivot_ids, source_ids))

    def add_rows(self, pivot: Rows, source: Rows) -> None:
        """Count chosen rows of one dialogue (`bytes`: the tokens they predict, `dtw`: the tokens they have read)."""
        pairs = self._byte_pairs(pivot, source) if self.path == "bytes" else self._path_pairs(pivot, source)
        self._pending.append(pairs[0].astype(np.int64) << FIELD_BITS | pairs[1].astype(np.int64))
        self._num_pending += len(pairs[0])
        if self._num_pending > PENDING_LIMIT:
            self._settle()

    def merge(self, other: "MappingStatistics") -> None:
        """Add the counts of `other`; raises UserError if it is about other vocabularies or another path."""
        self.require_same(other.path, other.pair, "the statistics to merge")
        other._settle()
        self._fold(other._keys, other._counts)

    def save(self, path: Path | str) -> None:
        """Write an .npz file whose bytes depend on the counts only."""
        self._settle()
        content = io.BytesIO()
        np.savez(content, identity=np.array(self._identity()), keys=self._keys, counts=self._counts)
        write_bytes(Path(path), content.getvalue())

    def load(self, path: Path | str) -> "MappingStatistics":
        """Replace the counts by those of a saved file; raises UserError if it is about other vocabularies or paths."""
        with np.load(Path(path), allow_pickle=False) as saved:
            _require_equal(self._identity(), saved["identity"].tolist(), str(path))
            self._keys, self._counts = saved["keys"], saved["counts"]
        self._pending, self._num_pending = [], 0
        return self

    @property
    def counts(self) -> np.ndarray:
        """int64 [P, 3]: pivot id, source id, count; ascending by pivot id, then source id."""
        self._settle()
        return np.stack([self._keys >> FIELD_BITS, self._keys & FIELD_MASK, self._counts], axis=1)

    def most_frequent(self) -> np.ndarray:
        """int32 [V_source]: the pivot id counted most often with each source id (ties: lowest id), -1 if never."""
        self._settle()
        return _most_frequent(self._keys, self._counts, len(self.pair.source))

    def _byte_pairs(self, pivot: Rows, source: Rows) -> tuple[np.ndarray, np.ndarray]:
        rows_R = boundary_rows(pivot.ends, source.ends)
        aligned = np.flatnonzero(rows_R >= 0)
        pivot_ids, source_ids = pivot.next[aligned], source.next[rows_R[aligned]]
        known = (pivot_ids >= 0) & (source_ids >= 0)
        return pivot_ids[known], source_ids[known]

    def _path_pairs(self, pivot: Rows, source: Rows) -> tuple[np.ndarray, np.ndarray]:
        if not len(pivot) or not len(source):
            return pivot.read[:0], source.read[:0]
        lo_R, hi_R = published_path(self.pair, pivot, source, self._pivot_pieces, self._source_pieces)
        width_R = hi_R - lo_R + 1
        position = np.repeat(np.arange(len(pivot)), width_R)
        offset = np.arange(len(position)) - np.repeat(np.cumsum(width_R) - width_R, width_R)
        visits = np.unique(position << FIELD_BITS | source.read[lo_R[position] + offset])
        return pivot.read[visits >> FIELD_BITS], visits & FIELD_MASK

    def _settle(self) -> None:
        """Fold the pending pairs into the sorted counts; here, once per distinct pair, bytes are compared."""
        if self._pending:
            keys, counts = np.unique(np.concatenate(self._pending), return_counts=True)
            self._pending, self._num_pending = [], 0
            if self.path == "bytes":
                related_P = self._share_bytes(keys >> FIELD_BITS, keys & FIELD_MASK)
                keys, counts = keys[related_P], counts[related_P]
            self._fold(keys, counts)

    def _share_bytes(self, pivot_P: np.ndarray, source_P: np.ndarray) -> np.ndarray:
        """bool [P]: `pair.share_bytes` of many pairs."""
        pair = self.pair
        turn_ends = pair.pivot_end_of_turn, pair.source_end_of_turn
        pivot_end, source_end = (-1 if end is None else end for end in turn_ends)
        ours, theirs = _contents(pair.pivot), _contents(pair.source)
        return _share_bytes(pivot_P, source_P, pivot_end, source_end, *ours, *theirs)

    def _fold(self, keys: np.ndarray, counts: np.ndarray) -> None:
        """Add the counts of other distinct keys, which ascend."""
        self._keys, self._counts = _merged(self._keys, self._counts, keys, counts)

    def require_same(self, path: str, pair: VocabularyPair, what: str) -> None:
        """Raises UserError unless these counts are about `path` and the vocabularies of `pair`."""
        _require_equal(self._identity(), [path, pair.pivot.fingerprint, pair.source.fingerprint], what)

    def _identity(self) -> list[str]:
        return [self.path, self.pair.pivot.fingerprint, self.pair.source.fingerprint]


def _require_equal(ours: list[str], theirs: list[str], what: str) -> None:
    triples = zip(("path", "pivot vocabulary", "source vocabulary"), theirs, ours, strict=True)
    problems = [
        f"mapping statistics: {what} has {name} {other}, the counts have {own}; count them again for this pair"
        for name, other, own in triples
        if other != own
    ]
    raise_problems(problems)


def _contents(table: TokenBytes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.frombuffer(table.buffer, dtype=np.uint8), table.offsets, table.width


@njit(cache=True, nogil=True)
def _share_bytes(
    pivot_P: np.ndarray,
    source_P: np.ndarray,
    pivot_end: int,
    source_end: int,
    pivot_buffer: np.ndarray,
    pivot_offsets: np.ndarray,
    pivot_width: np.ndarray,
    source_buffer: np.ndarray,
    source_offsets: np.ndarray,
    source_width: np.ndarray,
) -> np.ndarray:
    related_P = np.empty(len(pivot_P), dtype=np.bool_)
    for p in range(len(pivot_P)):
        ours, theirs, shorter = pivot_P[p], source_P[p], 0
        if ours < len(pivot_width) and theirs < len(source_width):
            shorter = min(pivot_width[ours], source_width[theirs])
        related_P[p] = shorter > 0 or (ours == pivot_end and theirs == source_end)
        for at in range(shorter):
            if pivot_buffer[pivot_offsets[ours] + at] != source_buffer[source_offsets[theirs] + at]:
                related_P[p] = False
                break
    return related_P


@njit(cache=True, nogil=True)
def _merged(
    keys_A: np.ndarray, counts_A: np.ndarray, keys_B: np.ndarray, counts_B: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The distinct keys of two ascending lists, ascending, and their counts added up."""
    keys = np.empty(len(keys_A) + len(keys_B), dtype=np.int64)
    counts = np.empty(len(keys), dtype=np.int64)
    a = b = size = 0
    while a < len(keys_A) or b < len(keys_B):
        in_a = a < len(keys_A) and (b == len(keys_B) or keys_A[a] <= keys_B[b])
        in_b = b < len(keys_B) and (a == len(keys_A) or keys_B[b] <= keys_A[a])
        keys[size], counts[size] = (keys_A[a] if in_a else keys_B[b]), 0
        if in_a:
            counts[size] += counts_A[a]
            a += 1
        if in_b:
            counts[size] += counts_B[b]
            b += 1
        size += 1
    return keys[:size].copy(), counts[:size].copy()


@njit(cache=True, nogil=True)
def _most_frequent(keys_P: np.ndarray, counts_P: np.ndarray, num_source: int) -> np.ndarray:
    """int32 [V_source]; pivot ids ascend with the keys, so the first of equal counts is the lowest."""
    best_V, count_V = np.full(num_source, -1, dtype=np.int32), np.zeros(num_source, dtype=np.int64)
    for p in range(len(keys_P)):
        source = keys_P[p] & FIELD_MASK
        if source < num_source and counts_P[p] > count_V[source]:
            best_V[source], count_V[source] = keys_P[p] >> FIELD_BITS, counts_P[p]
    return best_V


def published_path(
    pair: VocabularyPair, pivot: Rows, source: Rows, pivot_pieces: Pieces, source_pieces: Pieces
) -> tuple[np.ndarray, np.ndarray]:
    """`dtw_path` over the tokens that the rows have read, with each side's own space marker."""
    return dtw_path(
        source_pieces(source.read.tolist()),
        pivot_pieces(pivot.read.tolist()),
        source_marker=pair.source.space_marker,
        pivot_marker=pair.pivot.space_marker,
    )
