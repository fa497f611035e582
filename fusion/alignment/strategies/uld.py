"""`uld`, universal logit distillation: https://arxiv.org/abs/2402.12030; how sure the source is, not of what."""

import numpy as np

from fusion.alignment.alignment import Alignment, Support
from fusion.alignment.rows import Rows
from fusion.alignment.statistics import MappingStatistics
from fusion.alignment.target_kind import RANKS, TargetKind
from fusion.alignment.vocabularies import UNMAPPED, VocabularyPair

USES_STATISTICS = False


class UniversalLogits(Alignment):
    """Rows: the last source row that has read the same text. Targets are sorted probabilities: id k is rank k."""

    kind = TargetKind(RANKS)

    def align(self, pivot: Rows, source: Rows) -> np.ndarray:
        return self.sequence.walk(pivot, source).rows_R

    def targets(self, source_ids: np.ndarray) -> np.ndarray:
        """There is no vocabulary map: no id becomes another."""
        return np.full(np.shape(source_ids), UNMAPPED, dtype=np.int32)

    def translate(
        self, pivot: Rows, source: Rows, wanted_R: np.ndarray, rows_R: np.ndarray, support: Support
    ) -> Support:
        logs_RK = -np.sort(-support.logs_RK, axis=1)
        return Support(np.broadcast_to(np.arange(logs_RK.shape[1]), logs_RK.shape), logs_RK)


def build(pair: VocabularyPair, statistics: MappingStatistics | None) -> Alignment:
    """`statistics` are not used."""
    return UniversalLogits(pair)
