"""The two ways to lay token sequences side by side: exact bytes, or the authors' dynamic-programming path.

Legend: R rows of the pivot; a row's image are the source positions beside it on the published path.
"""

from typing import NamedTuple, Protocol

import numpy as np

from fusion.alignment.pieces import Pieces
from fusion.alignment.rows import UNALIGNED, Rows, boundary_rows, ends_together, same_start
from fusion.alignment.statistics import published_path
from fusion.alignment.vocabularies import BYTES, VocabularyPair


class Walk(NamedTuple):
    """Two sequences side by side, as seen from every pivot row."""

    rows_R: np.ndarray
    """int32 [R]: the source row that has read the same text, -1 where there is none."""
    is_same_R: np.ndarray
    """bool [R]: the tokens read at the two rows stand for the same piece of text."""
    is_next_same_R: np.ndarray
    """bool [R]: so do the tokens that the two rows predict."""


class SequencePath(Protocol):
    """Lays whole dialogues side by side."""

    exact: bool
    """Whether places are compared as bytes, so that rows inside a token of the other side have a place too."""

    def walk(self, pivot: Rows, source: Rows) -> Walk:
        """`pivot` and `source` are all rows of one dialogue."""


class BytePath:
    """Rows stand side by side where both have read exactly the same bytes."""

    exact = True

    def walk(self, pivot: Rows, source: Rows) -> Walk:
        rows_R = boundary_rows(pivot.ends, source.ends)
        aligned_R = rows_R >= 0
        return Walk(
            rows_R,
            aligned_R & same_start(pivot, source, rows_R),
            aligned_R & ends_together(pivot, source, rows_R),
        )


class DtwPath:
    """Rows stand side by side where the published path says so: the last piece of the image speaks.

    It may only where one of the two pieces, markers apart, is a suffix of the other; a piece that is nothing but a
    marker suits only its like, and the ends of turn suit each other. https://arxiv.org/abs/2401.10491 (section 3.2)
    """

    exact = False

    def __init__(self, pair: VocabularyPair) -> None:
        self._pair = pair
        self._pivot_pieces, self._source_pieces = Pieces(pair.pivot_tokenizer), Pieces(pair.source_tokenizer)
        self._judged: dict[tuple[int, int], tuple[bool, bool]] = {}

    def walk(self, pivot: Rows, source: Rows) -> Walk:
        nothing_R = np.zeros(len(pivot), dtype=bool)
        if not len(pivot) or not len(source):
            return Walk(np.full(len(pivot), UNALIGNED, dtype=np.int32), nothing_R, nothing_R)
        lo_R, hi_R = published_path(self._pair, pivot, source, self._pivot_pieces, self._source_pieces)
        pairs = zip(pivot.read.tolist(), source.read[hi_R].tolist(), strict=True)
        suits_R, equal_R = np.array([self._judge(*pair) for pair in pairs]).T
        shared_R = np.append(hi_R[:-1] == lo_R[1:], False)
        alone_R = (lo_R == hi_R) & ~shared_R & ~np.append(False, shared_R[:-1])
        rows_R = np.where(suits_R, hi_R, UNALIGNED).astype(np.int32)
        is_same_R = equal_R & alone_R
        is_next_R = np.append(is_same_R[1:] & (rows_R[:-1] >= 0) & (rows_R[1:] == rows_R[:-1] + 1), False)
        return Walk(rows_R, is_same_R, is_next_R)

    def _judge(self, pivot_id: int, source_id: int) -> tuple[bool, bool]:
        """Whether the pieces of two tokens suit each other, and whether they are equal; each pair is judged once."""
        key = pivot_id, source_id
        if key not in self._judged:
            ours = _bare(self._pivot_pieces[pivot_id], self._pair.pivot.space_marker)
            theirs = _bare(self._source_pieces[source_id], self._pair.source.space_marker)
            equal = ours == theirs or key == (self._pair.pivot_end_of_turn, self._pair.source_end_of_turn)
            suits = bool(ours and theirs) and (ours.endswith(theirs) or theirs.endswith(ours))
            self._judged[key] = equal or suits, equal
        return self._judged[key]


def _bare(piece: str, marker: str) -> str:
    """Without the marker, or the space in front that it decodes to."""
    return piece.replace(marker, "").removeprefix(" ")


def sequence_path(pair: VocabularyPair) -> SequencePath:
    """The path that the pair names."""
    return BytePath() if pair.path == BYTES else DtwPath(pair)
