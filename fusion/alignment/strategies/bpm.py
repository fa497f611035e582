"""`bpm`, byte-prefix marginals: https://arxiv.org/abs/2607.22334; mass goes to the longest token that begins it."""

from functools import cached_property

from fusion.alignment.alignment import Alignment
from fusion.alignment.continuations import Continuations
from fusion.alignment.statistics import MappingStatistics
from fusion.alignment.vocabularies import UNMAPPED, VocabularyPair

USES_STATISTICS = False


class BytePrefixMarginals(Continuations):
    """Vocabulary: the longest pivot token that is a byte prefix of what the candidate goes on with.

    A token of white space alone gets no mass of candidates that say more: they hardly differ in it, and what they do
    say would be lost.
    """

    def target(self, written: bytes, done: bytes) -> int:
        rest, ids = written[len(done) :], self.pair.pivot.id_of
        for size in range(min(len(rest), self._longest), 0, -1):
            if rest[:size] in ids:
                return UNMAPPED if rest[:size].isspace() and not rest.isspace() else ids[rest[:size]]
        return UNMAPPED

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self.pair.pivot.id_of), default=0)


def build(pair: VocabularyPair, statistics: MappingStatistics | None) -> Alignment:
    """`statistics` are not used."""
    return BytePrefixMarginals(pair)
