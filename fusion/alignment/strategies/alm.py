"""`alm`, approximate likelihood matching: https://arxiv.org/abs/2503.20083; spans of text instead of tokens.

Legend: N rows of a whole dialogue, R wanted rows of the pivot, S stored rows of the source, J spans.
"""

import numpy as np

from fusion.alignment.alignment import Alignment, Spoken
from fusion.alignment.rows import UNALIGNED, Rows
from fusion.alignment.statistics import MappingStatistics
from fusion.alignment.target_kind import SPANS, TargetKind
from fusion.alignment.vocabularies import UNMAPPED, VocabularyPair
from fusion.config import UserError
from fusion.teaching.sparse_rows import loose_rows
from fusion.teaching.store import TeacherRows

USES_STATISTICS = False
LEAST = float(np.finfo(np.float32).tiny)


class LikelihoodMatching(Alignment):
    """Rows: the last source row that has read the same text; what lies between two such places is a span.

    A target says how likely the source finds the text of the row's span. Spans with text that is not supervised on
    both sides have none.
    """

    def __init__(self, pair: VocabularyPair, temperature: float) -> None:
        super().__init__(pair)
        self.kind = TargetKind(SPANS, temperature)

    def align(self, pivot: Rows, source: Rows) -> np.ndarray:
        return self.sequence.walk(pivot, source).rows_R

    def targets(self, source_ids: np.ndarray) -> np.ndarray:
        """There is no vocabulary map: no id becomes another."""
        return np.full(np.shape(source_ids), UNMAPPED, dtype=np.int32)

    def speak(
        self, pivot: Rows, source: Rows, teacher: TeacherRows, wanted_R: np.ndarray, stored_S: np.ndarray
    ) -> Spoken:
        """The source's row is that before the span."""
        rows_N = self.align(pivot, source)
        begins_J = self._begins(rows_N)
        num_spans = len(begins_J)
        if not num_spans:
            return Spoken(np.full(len(wanted_R), UNALIGNED, dtype=np.int32), loose_rows(*_NOTHING, len(wanted_R)))
        pivot_span_N = _spans(len(pivot), begins_J)
        source_span_N = _spans(len(source), _first_rows(source.ends)[rows_N[begins_J]])
        told_J = np.bincount(source_span_N[stored_S] + 1, minlength=num_spans + 1)[1:] > 0
        told_J[_unsupervised(pivot, wanted_R, pivot_span_N)] = False
        told_J[_unsupervised(source, stored_S, source_span_N)] = False
        nll_J = np.bincount(source_span_N[stored_S] + 1, teacher.nll_R.astype(np.float64), num_spans + 1)[1:]
        span_R = pivot_span_N[wanted_R]
        told = np.flatnonzero((span_R >= 0) & told_J[span_R])
        _, first, place = np.unique(span_R[told], return_index=True, return_inverse=True)
        weights = np.maximum(np.exp(-nll_J[span_R[told]] / self.kind.temperature), LEAST)
        rows_R = np.full(len(wanted_R), UNALIGNED, dtype=np.int32)
        rows_R[told] = rows_N[begins_J][span_R[told]]
        return Spoken(rows_R, loose_rows(told, told[first][place], weights, len(wanted_R)))

    def _begins(self, rows_N: np.ndarray) -> np.ndarray:
        """int64 [J]: the pivot's row before each span; ascending.

        Of rows that share a source row, all at one byte, it is the first, so that tokens of no width are of the span
        that they precede. On the published path such rows have read ever more of the source's token: it is the last.
        """
        aligned = np.flatnonzero(rows_N >= 0)
        changes = np.flatnonzero(np.diff(rows_N[aligned]))
        edges = np.append(0, changes + 1) if self.sequence.exact else np.append(changes, len(aligned) - 1)
        return aligned[edges] if len(aligned) else aligned


_NOTHING = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), np.zeros(0)


def _spans(num_rows: int, begins_J: np.ndarray) -> np.ndarray:
    """int64 [N]: the last span that begins at or before each row, -1 before the first."""
    return np.searchsorted(begins_J, np.arange(num_rows), side="right") - 1


def _first_rows(ends_N: np.ndarray) -> np.ndarray:
    """int64 [N]: the first of the rows that have read the same bytes as each row."""
    differs_N = np.append(True, (np.diff(ends_N) != 0) | (ends_N[1:] < 0))[: len(ends_N)]
    return np.maximum.accumulate(np.where(differs_N, np.arange(len(ends_N)), 0))


def _unsupervised(rows: Rows, supervised: np.ndarray, span_N: np.ndarray) -> np.ndarray:
    """Spans with a token that has text, or an unknown place, and is not supervised.

    What the last row predicts is such a token, so the last span, which has no end, is among them.
    """
    ends_N, next_ends_N = rows.ends, np.append(rows.ends[1:], UNALIGNED)
    counts_N = (ends_N != next_ends_N) | (ends_N < 0)
    counts_N[supervised] = False
    return span_N[counts_N & (span_N >= 0)]


def build(pair: VocabularyPair, statistics: MappingStatistics | None, temperature: float = 100.0) -> Alignment:
    """`statistics` are not used. Raises UserError for a temperature that is not a number above 0."""
    if not isinstance(temperature, int | float) or not temperature > 0:
        raise UserError(f"alignment.options.temperature={temperature}: a number above 0 is expected")
    return LikelihoodMatching(pair, float(temperature))
