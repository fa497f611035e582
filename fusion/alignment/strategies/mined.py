"""`mined`, minimum edit distance: FuseLLM's vocabulary map. https://arxiv.org/abs/2401.10491 (section 3.2)."""

from typing import Any

import numpy as np
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

from fusion.alignment.alignment import Alignment
from fusion.alignment.rows import UNALIGNED, Rows, boundary_rows, same_start
from fusion.alignment.statistics import MappingStatistics
from fusion.alignment.vocabularies import UNMAPPED, VocabularyPair
from fusion.dialogues.token_bytes import TokenBytes

UNSOUGHT = -2
QUERIES_AT_ONCE = 64


class MinimumEditDistance(Alignment):
    """Rows: both have read the same bytes, by equal tokens or by a source token that maps to the pivot's.

    Vocabulary: the equal byte string, else the pivot token whose string (spaces written as spaces) takes the fewest
    edits, the first of several in id order. Special tokens and byte pieces spell no text, so nothing is near to them;
    special tokens of the source without an equal are dropped. Sought only for ids that occur.
    """

    def __init__(self, pair: VocabularyPair) -> None:
        super().__init__(pair)
        self._targets_V = np.where(pair.equal_ids >= 0, pair.equal_ids, UNSOUGHT)
        self._targets_V[pair.source.width == 0] = np.maximum(pair.equal_ids, UNMAPPED)[pair.source.width == 0]
        self._source_strings = _strings(pair.source, pair.source_tokenizer)
        strings = _strings(pair.pivot, pair.pivot_tokenizer)
        near = [
            token for token in range(len(strings)) if pair.pivot.width[token] and token not in pair.pivot.byte_pieces
        ]
        self._near_ids, self._near_strings = np.array(near, dtype=np.int32), [strings[token] for token in near]

    def align(self, pivot: Rows, source: Rows) -> np.ndarray:
        rows_R = boundary_rows(pivot.ends, source.ends)
        if not len(source):
            return rows_R
        alike = same_start(pivot, source, rows_R) | (self.targets(source.read)[rows_R] == pivot.read)
        return np.where((rows_R >= 0) & alike, rows_R, UNALIGNED).astype(np.int32)

    def targets(self, source_ids: np.ndarray) -> np.ndarray:
        wanted = np.unique(source_ids)
        unsought = wanted[self._targets_V[wanted] == UNSOUGHT]
        for start in range(0, len(unsought), QUERIES_AT_ONCE):
            self._seek(unsought[start : start + QUERIES_AT_ONCE])
        return self._targets_V[source_ids]

    def _seek(self, source_ids: np.ndarray) -> None:
        queries = [self._source_strings[token] for token in source_ids.tolist()]
        distances = cdist(queries, self._near_strings, scorer=Levenshtein.distance, dtype=np.int32)
        self._targets_V[source_ids] = self._near_ids[distances.argmin(axis=1)]


def _strings(table: TokenBytes, tokenizer: Any) -> list[str]:
    """Every token as text where its bytes are text, else as the tokeniser writes it."""
    raw = tokenizer.convert_ids_to_tokens(list(range(len(table))))
    return [_string(table[token], piece or "") for token, piece in enumerate(raw)]


def _string(content: bytes, piece: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return piece


def build(pair: VocabularyPair, statistics: MappingStatistics | None) -> Alignment:
    """`statistics` are not used."""
    return MinimumEditDistance(pair)
