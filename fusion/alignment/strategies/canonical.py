"""`canonical`: candidates are cut with the pivot's own tokeniser, and their mass goes to the first piece."""

from functools import cached_property

from fusion.alignment.alignment import Alignment
from fusion.alignment.continuations import Continuations
from fusion.alignment.cut import Cutter
from fusion.alignment.statistics import MappingStatistics
from fusion.alignment.vocabularies import UNMAPPED, VocabularyPair

USES_STATISTICS = False
TWO, THREE, FOUR = 0xC0, 0xE0, 0xF0  # from these first bytes on, a character of UTF-8 has that many bytes


class CanonicalRetokenisation(Continuations):
    """Vocabulary: the token with which the pivot's tokeniser goes on.

    The whole candidate is cut; if its first pieces spell exactly what the pivot has written of it, the next one is
    it. Else the pivot has cut otherwise, and the rest is cut alone. Pieces that spell other bytes (the tokeniser
    rewrites the text) are none. A candidate that stops within a character is written in byte pieces only if the pivot
    has no piece for any character that it may become; else the next piece is open, and the candidate is dropped.
    """

    def __init__(self, pair: VocabularyPair) -> None:
        super().__init__(pair)
        self._cutter = Cutter(pair.pivot_tokenizer, pair.pivot)

    def target(self, written: bytes, done: bytes) -> int:
        position, pieces = 0, iter(self._cutter.cut(written))
        while position < len(done):
            position += len(self.pair.pivot[next(pieces, UNMAPPED)]) or len(written)
        if position > len(done):
            pieces = iter(self._cutter.cut(written[len(done) :]))
        piece = next(pieces, UNMAPPED)
        content = self.pair.pivot[piece]
        if piece in self.pair.pivot.byte_pieces and written[len(done) :] in self._open_characters:
            return UNMAPPED
        return piece if content and written.startswith(content, len(done)) else UNMAPPED

    @cached_property
    def _open_characters(self) -> set[bytes]:
        """Incomplete characters with which some whole piece of the pivot begins."""
        pivot = self.pair.pivot
        wide = [
            content for content, token in pivot.id_of.items() if content[0] >= TWO and token not in pivot.byte_pieces
        ]
        return {
            content[:size] for content in wide for size in range(1, 2 + (content[0] >= THREE) + (content[0] >= FOUR))
        }


def build(pair: VocabularyPair, statistics: MappingStatistics | None) -> Alignment:
    """`statistics` are not used."""
    return CanonicalRetokenisation(pair)
