"""`ms_released`: the alignment of the FuseChat authors' code, for published numbers; `ms` is what is right.

https://arxiv.org/abs/2408.07990. It differs from the paper, on purpose kept here, in these ways:
- rows are matched on the dynamic-programming path by string suffixes (the empty string ends every string), so a row
  may speak although its model has read other text;
- where several source rows meet one pivot row, the first whose piece fits is used, not the last; without the matrix
  such rows always learn the reference token alone;
- a source id without an equal string takes the pivot id with the smallest (edit distance x sigmoid(count)) among those
  it was counted with, a tenth of that if one string contains the other; so more counts make a pair *less* likely;
- ids that were never counted become the unknown token (else the end of sequence);
- of several source ids that become one pivot id the first keeps its place, the mass of the others is lost.
"""

import numpy as np
from numpy.typing import ArrayLike
from rapidfuzz.distance import Levenshtein

from fusion.alignment.alignment import Alignment, MappedRows, mapped_rows
from fusion.alignment.pieces import Pieces
from fusion.alignment.rows import Rows
from fusion.alignment.statistics import MappingStatistics, published_path
from fusion.alignment.vocabularies import UNMAPPED, VocabularyPair
from fusion.config import UserError

ONE_HOT, EMPTY = -1, -2
CONTAINED = 0.1


class ReleasedAlignment(Alignment):
    """`align` gives -1 where the authors train on the reference token alone, and -2 where they train on nothing.

    It always walks the published path, over the tokens that the given rows have read.
    """

    sums_masses = False

    def __init__(self, pair: VocabularyPair, statistics: MappingStatistics, use_matrix: bool) -> None:
        super().__init__(pair)
        self._use_matrix = use_matrix
        self._pivot_pieces, self._source_pieces = Pieces(pair.pivot_tokenizer), Pieces(pair.source_tokenizer)
        self._targets_V = _targets(pair, statistics)

    def targets(self, source_ids: np.ndarray) -> np.ndarray:
        return self._targets_V[source_ids]

    def align(self, pivot: Rows, source: Rows) -> np.ndarray:
        if not len(pivot) or not len(source):
            return np.full(len(pivot), ONE_HOT, dtype=np.int32)
        lo_R, hi_R = published_path(self.pair, pivot, source, self._pivot_pieces, self._source_pieces)
        ours, theirs = self._pivot_pieces(pivot.read.tolist()), self._source_pieces(source.read.tolist())
        bounds = zip(ours, lo_R.tolist(), hi_R.tolist(), strict=True)
        return np.array([self._row(piece, theirs[lo : hi + 1], lo) for piece, lo, hi in bounds], dtype=np.int32)

    def map_rows(
        self,
        pivot_ids: ArrayLike,
        source_ids: ArrayLike,
        source_topk_ids_SK: ArrayLike,
        source_topk_logits_SK: ArrayLike,
    ) -> MappedRows:
        """As the authors: rows without a source row hold the reference token, at the last position the one before."""
        rows_R, support = self._all_rows(pivot_ids, source_ids, source_topk_ids_SK, source_topk_logits_SK)
        next_R = np.append(np.asarray(pivot_ids, dtype=np.int64)[1:], UNMAPPED)[: len(rows_R)]
        labels_R = np.concatenate([next_R[:-1], next_R[-2:-1], next_R])[: len(rows_R)]
        alone = np.flatnonzero(rows_R == ONE_HOT)
        support.ids_RK[alone, 0], support.logs_RK[alone, 0] = labels_R[alone], 0.0
        return mapped_rows(support, self.sums_masses)

    def _row(self, piece: str, image: list[str], lo: int) -> int:
        """Source row for a pivot piece whose image on the path is `image`, the pieces from position `lo` on."""
        ours, theirs = self.pair.pivot.space_marker, self.pair.source.space_marker
        if len(image) == 1:
            return lo if _one_ends_other(image[0].replace(theirs, ours), piece) else ONE_HOT
        if not self._use_matrix:
            return ONE_HOT
        bare, bare_image = piece.replace(ours, ""), [each.replace(theirs, "") for each in image]
        if piece != ours:
            for offset, each in enumerate(bare_image):
                if _one_ends_other(each, bare):
                    return lo + offset
        matched, rest = _consume(bare, bare_image)
        joined = "".join(bare_image)
        if matched and not rest:
            return lo + matched - 1
        return EMPTY if _one_ends_other(joined, bare) else ONE_HOT


def _one_ends_other(a: str, b: str) -> bool:
    return a.endswith(b) or b.endswith(a)


def _consume(piece: str, image: list[str]) -> tuple[int, str]:
    """How many pieces from the left spell the beginning of `piece`, and what of it remains."""
    matched = 0
    while matched < len(image) and piece and piece.startswith(image[matched]):
        piece, matched = piece.removeprefix(image[matched]), matched + 1
    return matched, piece


def _targets(pair: VocabularyPair, statistics: MappingStatistics) -> np.ndarray:
    """int32 [V_source]: by equal string, by the statistics, or to the unknown token; ends of sequence by name."""
    pivot, source = pair.pivot_tokenizer, pair.source_tokenizer
    vocabulary = pivot.get_vocab()
    strings = source.convert_ids_to_tokens(list(range(len(pair.source))))
    spelled = [(string or "").replace(pair.source.space_marker, pair.pivot.space_marker) for string in strings]
    mined_V = _mined(pair, statistics, strings)
    for ours, theirs in (
        (pivot.bos_token_id, source.bos_token_id),
        (pivot.eos_token_id, source.eos_token_id),
    ):
        if ours is not None and theirs is not None:
            mined_V[theirs] = ours
    return np.array(
        [vocabulary.get(string, mined) for string, mined in zip(spelled, mined_V, strict=True)], dtype=np.int32
    )


def _mined(pair: VocabularyPair, statistics: MappingStatistics, strings: list[str]) -> np.ndarray:
    pivot = pair.pivot_tokenizer
    unseen = pivot.eos_token_id if pivot.unk_token_id is None else pivot.unk_token_id
    mined_V = np.full(len(strings), UNMAPPED if unseen is None else unseen, dtype=np.int32)
    best_V = np.full(len(strings), np.inf)
    for pivot_id, source_id, count in statistics.counts.tolist():
        distance = _distance(pair, pivot.convert_ids_to_tokens(pivot_id), strings[source_id])
        distance /= 1 + np.exp(-count)
        if distance < best_V[source_id]:
            best_V[source_id], mined_V[source_id] = distance, pivot_id
    return mined_V


def _distance(pair: VocabularyPair, ours: str, theirs: str) -> float:
    """Edit distance without the markers, with them where nothing would be left; a tenth if one contains the other."""
    bare, bare_theirs = ours.replace(pair.pivot.space_marker, ""), theirs.replace(pair.source.space_marker, "")
    if not bare or not bare_theirs:
        bare, bare_theirs = ours, theirs.replace(pair.source.space_marker, pair.pivot.space_marker)
    contained = bare in bare_theirs or bare_theirs in bare
    return Levenshtein.distance(bare, bare_theirs) * (CONTAINED if contained else 1.0)


def build(pair: VocabularyPair, statistics: MappingStatistics | None, use_matrix: bool = True) -> Alignment:
    """`use_matrix` is the authors' switch: whether rows that meet several source rows may be matched at all.

    Raises UserError without `statistics` (the authors' are those with `path="dtw"`).
    """
    if statistics is None:
        raise UserError("alignment=ms_released needs mapping statistics; count them with path=dtw, as the authors do")
    return ReleasedAlignment(pair, statistics, use_matrix)
