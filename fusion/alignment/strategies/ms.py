"""`ms`, mapping statistics: FuseChat's alignment, exact on bytes. https://arxiv.org/abs/2408.07990 (section 3.2)."""

import numpy as np

from fusion.alignment.alignment import Alignment
from fusion.alignment.rows import Rows
from fusion.alignment.statistics import MappingStatistics
from fusion.alignment.vocabularies import VocabularyPair


class MappingStatisticsAlignment(Alignment):
    """Rows: the last source row that has read the same text (1-1, n-1 and 1-n alike).

    Vocabulary: the equal byte string, else the pivot token counted most often with the source token, else dropped.
    """

    def __init__(self, pair: VocabularyPair, statistics: MappingStatistics | None) -> None:
        super().__init__(pair)
        frequent_V = pair.equal_ids if statistics is None else statistics.most_frequent()
        self._targets_V = np.where(pair.equal_ids >= 0, pair.equal_ids, frequent_V)

    def align(self, pivot: Rows, source: Rows) -> np.ndarray:
        return self.sequence.walk(pivot, source).rows_R

    def targets(self, source_ids: np.ndarray) -> np.ndarray:
        return self._targets_V[source_ids]


def build(pair: VocabularyPair, statistics: MappingStatistics | None) -> Alignment:
    """Without `statistics` only equal byte strings are mapped."""
    return MappingStatisticsAlignment(pair, statistics)
