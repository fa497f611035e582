"""`random`: the control; a map of the vocabulary that has to be worse than any that means something."""

import numpy as np

from fusion.alignment.alignment import Alignment
from fusion.alignment.rows import Rows
from fusion.alignment.statistics import MappingStatistics
from fusion.alignment.vocabularies import UNMAPPED, VocabularyPair
from fusion.config import UserError

USES_STATISTICS = False


class RandomAlignment(Alignment):
    """Rows: as `ms`. Vocabulary: every source token goes to a pivot token drawn by `seed`, whatever either spells.

    Tokens that spell nothing, the ends of turn among them, are neither drawn nor mapped.
    """

    def __init__(self, pair: VocabularyPair, seed: int) -> None:
        super().__init__(pair)
        content = np.flatnonzero(pair.pivot.width)
        draws_V = np.random.Philox(key=seed).random_raw(len(pair.source))
        drawn_V = content[draws_V % np.uint64(len(content))]
        self._targets_V = np.where(pair.source.width > 0, drawn_V, UNMAPPED).astype(np.int32)

    def align(self, pivot: Rows, source: Rows) -> np.ndarray:
        return self.sequence.walk(pivot, source).rows_R

    def targets(self, source_ids: np.ndarray) -> np.ndarray:
        return self._targets_V[source_ids]


def build(pair: VocabularyPair, statistics: MappingStatistics | None, seed: int = 0) -> Alignment:
    """`statistics` are not used. Raises UserError for a seed that is no whole number from 0 on."""
    if not isinstance(seed, int) or seed < 0:
        raise UserError(f"alignment.options.seed={seed}: a whole number from 0 on is expected")
    return RandomAlignment(pair, seed)
