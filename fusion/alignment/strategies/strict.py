"""`strict`: one token against one token, between the same bytes; whatever else the source says stays apart."""

import numpy as np

from fusion.alignment.alignment import Alignment
from fusion.alignment.rows import UNALIGNED, Rows
from fusion.alignment.statistics import MappingStatistics
from fusion.alignment.vocabularies import VocabularyPair

USES_STATISTICS = False


class StrictAlignment(Alignment):
    """Rows: both have read the same text, and the tokens they predict end together. Vocabulary: equal bytes only."""

    def align(self, pivot: Rows, source: Rows) -> np.ndarray:
        walk = self.sequence.walk(pivot, source)
        return np.where(walk.is_next_same_R, walk.rows_R, UNALIGNED).astype(np.int32)

    def targets(self, source_ids: np.ndarray) -> np.ndarray:
        return self.pair.equal_ids[source_ids]


def build(pair: VocabularyPair, statistics: MappingStatistics | None) -> Alignment:
    """`statistics` are not used."""
    return StrictAlignment(pair)
