"""Two tokenisers side by side: what their tokens say alike, and sequences of both in one byte coordinate."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fusion.alignment.rows import UNKNOWN, Rows
from fusion.config import UserError
from fusion.dialogues.token_bytes import TokenBytes, token_bytes

UNMAPPED = -1
BYTES, DTW = "bytes", "dtw"
PATHS = (BYTES, DTW)


@dataclass(frozen=True, eq=False, repr=False)
class VocabularyPair:
    """The pivot's and the source's tokeniser, their byte tables, and the ids that end a turn (None: there is none)."""

    pivot_tokenizer: Any
    source_tokenizer: Any
    pivot: TokenBytes
    source: TokenBytes
    pivot_end_of_turn: int | None
    source_end_of_turn: int | None
    path: str = BYTES
    """How two sequences are laid side by side: `bytes` (both have read the same) or `dtw` (the authors' path)."""

    @classmethod
    def of(
        cls,
        pivot_tokenizer: Any,
        source_tokenizer: Any,
        pivot_end_of_turn: int | None = None,
        source_end_of_turn: int | None = None,
        path: str = BYTES,
    ) -> "VocabularyPair":
        """Byte tables of both; an end of turn that is not given is the tokeniser's end of sequence.

        Raises UserError for an unknown path or a tokeniser without a byte table.
        """
        if path not in PATHS:
            raise UserError(f"alignment.path={path}: choose one of {', '.join(PATHS)}")
        return cls(
            pivot_tokenizer,
            source_tokenizer,
            token_bytes(pivot_tokenizer),
            token_bytes(source_tokenizer),
            pivot_tokenizer.eos_token_id if pivot_end_of_turn is None else pivot_end_of_turn,
            source_tokenizer.eos_token_id if source_end_of_turn is None else source_end_of_turn,
            path,
        )

    @cached_property
    def equal_ids(self) -> np.ndarray:
        """int32 [V_source]: the pivot id with the same bytes (special tokens: the same literal), else -1.

        The source's end of turn maps to the pivot's. Equal tables map every id to itself.
        """
        if self.pivot.fingerprint == self.source.fingerprint:
            equal_V = np.arange(len(self.source), dtype=np.int32)
        else:
            id_of, size = self.pivot.id_of, len(self.source)
            contents = map(self.source.__getitem__, range(size))
            equal_V = np.fromiter((id_of.get(content, UNMAPPED) for content in contents), dtype=np.int32, count=size)
            literals = {self.pivot.literal(token): token for token in self.pivot.special[::-1].tolist()}
            for token in self.source.special.tolist():
                equal_V[token] = literals.get(self.source.literal(token), UNMAPPED)
        if self.source_end_of_turn is not None and self.pivot_end_of_turn is not None:
            equal_V[self.source_end_of_turn] = self.pivot_end_of_turn
        return equal_V

    def share_bytes(self, pivot_id: int, source_id: int) -> bool:
        """Whether one token's bytes start with the other's; the ends of turn share theirs, other events nothing."""
        ours, theirs = self.pivot[pivot_id], self.source[source_id]
        if not ours or not theirs:
            return (pivot_id, source_id) == (self.pivot_end_of_turn, self.source_end_of_turn)
        return ours.startswith(theirs) or theirs.startswith(ours)

    def rows(self, pivot_ids: ArrayLike, source_ids: ArrayLike) -> tuple[Rows, Rows]:
        """All rows of two token sequences of one text, in a byte coordinate that is found from the tokens alone.

        Turns (up to an end of turn, which counts as one byte) are compared one by one; from the first turn on that the
        two do not read alike, the places are unknown and no row aligns.
        """
        pivot_N, source_M = np.asarray(pivot_ids, dtype=np.int64), np.asarray(source_ids, dtype=np.int64)
        pivot_ends, source_ends = np.full(len(pivot_N), UNKNOWN), np.full(len(source_M), UNKNOWN)
        base = 0
        turns = zip(_turns(pivot_N, self.pivot_end_of_turn), _turns(source_M, self.source_end_of_turn), strict=False)
        for ours, theirs in turns:
            ends = self._common_ends(pivot_N[ours], source_M[theirs])
            if ends is None:
                break
            length, pivot_ends[ours], source_ends[theirs] = ends[0], base + ends[1], base + ends[2]
            base += length + 1
            pivot_ends[ours.stop : ours.stop + 1] = source_ends[theirs.stop : theirs.stop + 1] = base
        return Rows.of(pivot_N, pivot_ends), Rows.of(source_M, source_ends)

    def _common_ends(self, pivot_N: np.ndarray, source_M: np.ndarray) -> tuple[int, np.ndarray, np.ndarray] | None:
        """(bytes, ends of the pivot, ends of the source) in the text that both sequences spell; None if none is."""
        for text in (*_spellings(self.source, source_M), *_spellings(self.pivot, pivot_N)):
            pivot_ends = self.pivot.text_ends(pivot_N, text)
            source_ends = self.source.text_ends(source_M, text)
            if pivot_ends is not None and source_ends is not None:
                return len(text), pivot_ends, source_ends
        return None


def _turns(ids_N: np.ndarray, end_of_turn: int | None) -> Iterator[slice]:
    """Ranges of ids between ends of turn; the id at a range's stop, if any, is the end of turn."""
    start = 0
    for stop in np.flatnonzero(ids_N == (UNMAPPED if end_of_turn is None else end_of_turn)).tolist():
        yield slice(start, stop)
        start = stop + 1
    yield slice(start, len(ids_N))


def _spellings(table: TokenBytes, ids_N: np.ndarray) -> Iterator[bytes]:
    """Texts that one side's tokens may stand for: special tokens and first spaces in the text, or added to it."""
    for text in dict.fromkeys((table.written(ids_N), table.joined(ids_N))):
        yield text
        if text.startswith(b" "):
            yield text[1:]
