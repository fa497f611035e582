"""`mined`, minimum edit distance: FuseLLM's vocabulary map. https://arxiv.org/abs/2401.10491 (section 3.2)."""

from functools import cached_property
from typing import Any

import numpy as np

from fusion.alignment.alignment import Alignment
from fusion.alignment.nearest import NearestStrings
from fusion.alignment.rows import UNALIGNED, Rows
from fusion.alignment.statistics import MappingStatistics
from fusion.alignment.vocabularies import UNMAPPED, VocabularyPair
from fusion.dialogues.token_bytes import TokenBytes

USES_STATISTICS = False
UNSOUGHT = -2


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

    @cached_property
    def _source_strings(self) -> list[str]:
        return token_strings(self.pair.source, self.pair.source_tokenizer)

    @cached_property
    def _near(self) -> tuple[np.ndarray, NearestStrings]:
        """The pivot ids that may be near, and their strings."""
        table, strings = self.pair.pivot, token_strings(self.pair.pivot, self.pair.pivot_tokenizer)
        ids = [token for token in range(len(table)) if table.width[token] and token not in table.byte_pieces]
        return np.array(ids, dtype=np.int32), NearestStrings([strings[token] for token in ids])

    def align(self, pivot: Rows, source: Rows) -> np.ndarray:
        walk = self.sequence.walk(pivot, source)
        if not len(source):
            return walk.rows_R
        alike_R = walk.is_same_R | (self.targets(source.read)[walk.rows_R] == pivot.read)
        return np.where((walk.rows_R >= 0) & alike_R, walk.rows_R, UNALIGNED).astype(np.int32)

    def targets(self, source_ids: np.ndarray) -> np.ndarray:
        """As everywhere; `targets(np.arange(len(pair.source)))` is the whole map."""
        targets = self._targets_V[source_ids]
        unsought = targets == UNSOUGHT
        if not unsought.any():
            return targets
        wanted = np.unique(source_ids[unsought])
        ids, strings = self._near
        self._targets_V[wanted] = ids[strings.nearest([self._source_strings[token] for token in wanted.tolist()])]
        return self._targets_V[source_ids]


def token_strings(table: TokenBytes, tokenizer: Any) -> list[str]:
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
