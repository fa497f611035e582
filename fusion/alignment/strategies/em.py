"""`em`, exact match: https://arxiv.org/abs/2301.12726; only what is equal is aligned."""

import numpy as np

from fusion.alignment.alignment import Alignment
from fusion.alignment.rows import UNALIGNED, Rows
from fusion.alignment.statistics import MappingStatistics
from fusion.alignment.vocabularies import VocabularyPair

USES_STATISTICS = False


class ExactMatch(Alignment):
    """Rows: the tokens read cover the same text. Vocabulary: equal byte strings; the rest is dropped."""

    def align(self, pivot: Rows, source: Rows) -> np.ndarray:
        walk = self.sequence.walk(pivot, source)
        return np.where(walk.is_same_R, walk.rows_R, UNALIGNED).astype(np.int32)

    def targets(self, source_ids: np.ndarray) -> np.ndarray:
        return self.pair.equal_ids[source_ids]


def build(pair: VocabularyPair, statistics: MappingStatistics | None) -> Alignment:
    """`statistics` are not used."""
    return ExactMatch(pair)
