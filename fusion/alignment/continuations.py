"""Alignments that ask how a candidate of the source goes on, in bytes, from what the pivot has read.

At a shared boundary a candidate goes on as it is written. Inside a token of the source, the source row before that
token speaks, conditioned on the bytes of it that the pivot has read since: only candidates that begin with them and go
beyond them count, and what counts is scaled to 1.
Legend: N rows of a whole dialogue, R rows of the pivot, K candidates of a row, A candidates that are given.
"""

from abc import abstractmethod
from typing import NamedTuple

import numpy as np

from fusion.alignment.alignment import Alignment, Support
from fusion.alignment.rows import UNALIGNED, Rows, inner_rows
from fusion.alignment.vocabularies import UNMAPPED, VocabularyPair
from fusion.dialogues.token_bytes import TokenBytes

RULED_OUT = -2
ID_BITS = 32
ID_MASK = (1 << ID_BITS) - 1
REMEMBERED = 1 << 20


class Context(NamedTuple):
    """What has to be known of a pair of rows to say how a candidate goes on."""

    drops_space: bool
    """The source starts a segment here: its candidates begin with a space that is not in the text."""
    lead: bytes
    """A space where the pivot starts a segment, and writes one that is not in the text; else nothing."""
    done: bytes
    """What the pivot has written of the source's next token, its lead included; nothing at a shared boundary."""


BOUNDARY = Context(False, b"", b"")


class Continuations(Alignment):
    """Rows: the last source row that has read the same text, else the row before the token that is under way.

    Rows of the latter kind need exact bytes, so the published path has none. The source's end of turn, and special
    tokens written alike, map to their equals at shared boundaries.
    """

    def __init__(self, pair: VocabularyPair) -> None:
        super().__init__(pair)
        self._same_vocabulary = pair.pivot.fingerprint == pair.source.fingerprint
        self._contexts: list[Context] = []
        self._number_of: dict[Context, int] = {}
        self._target_of: dict[int, int] = {}
        self._forget()

    @abstractmethod
    def target(self, written: bytes, done: bytes) -> int:
        """The pivot id that goes on with `written` (a candidate as the pivot writes it) after `done`, -1 if none.

        `written` begins with `done` and is longer.
        """

    def align(self, pivot: Rows, source: Rows) -> np.ndarray:
        rows_R = self.sequence.walk(pivot, source).rows_R
        if not self.sequence.exact:
            return rows_R
        inner_R = inner_rows(pivot.ends, source.ends)
        whole_N = np.append(np.diff(source.ends), UNALIGNED) == _spelled(self.pair.source, source)
        whole_R = (inner_R >= 0) & np.append(whole_N, False)[inner_R]  # not a token that reaches into the template
        return np.where((rows_R < 0) & whole_R, inner_R, rows_R).astype(np.int32)

    def targets(self, source_ids: np.ndarray) -> np.ndarray:
        """As at a shared boundary within a segment."""
        self._forget_much()
        return self._look_up(self._number(BOUNDARY) << ID_BITS | source_ids.astype(np.int64)).astype(np.int32)

    def translate(
        self, pivot: Rows, source: Rows, wanted_R: np.ndarray, rows_R: np.ndarray, support: Support
    ) -> Support:
        self._forget_much()
        context_R, is_begun_R = self._read_contexts(pivot, source, wanted_R, rows_R)
        given_RK = (support.ids_RK >= 0) & (support.logs_RK > -np.inf)
        targets_RK = np.full(given_RK.shape, UNMAPPED, dtype=np.int64)
        targets_RK[given_RK] = self._look_up((context_R[:, None] << ID_BITS | support.ids_RK)[given_RK])
        logs_RK = np.where(given_RK & (targets_RK != RULED_OUT), support.logs_RK, -np.inf)
        logs_RK[is_begun_R] = _normalised(logs_RK[is_begun_R])
        return Support(np.maximum(targets_RK, UNMAPPED), logs_RK)

    def _read_contexts(
        self, pivot: Rows, source: Rows, wanted_R: np.ndarray, rows_R: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The number of each row's context, int64 [R], and whether a token of the source is under way, bool [R]."""
        number_R = np.full(len(rows_R), self._number(BOUNDARY), dtype=np.int64)
        if not len(source):
            return number_R, np.zeros(len(rows_R), dtype=bool)
        leads_N, drops_N = _absent_space(self.pair.pivot, pivot), _absent_space(self.pair.source, source)
        begun_R = np.where(rows_R >= 0, pivot.ends[wanted_R] - source.ends[rows_R], 0) * self.sequence.exact
        lead_R = np.where(begun_R > 0, np.isin(source.ends[rows_R], pivot.ends[leads_N]), leads_N[wanted_R])
        drop_R = drops_N[rows_R]
        for r in np.flatnonzero((rows_R >= 0) & ((begun_R > 0) | lead_R | drop_R)).tolist():
            lead, drops = b" " if lead_R[r] else b"", bool(drop_R[r])
            content = self.pair.source[int(source.next[rows_R[r]])][drops:][: begun_R[r]]
            number_R[r] = self._number(Context(drops, lead, lead + content if content else b""))
        return number_R, begun_R > 0

    def _look_up(self, keys_A: np.ndarray) -> np.ndarray:
        """int64, the shape of `keys_A` (context number and source id): pivot ids, `UNMAPPED` or `RULED_OUT`."""
        unique, inverse_A = np.unique(keys_A, return_inverse=True)
        known, found = self._target_of, []
        for key in unique.tolist():
            target = known.get(key)
            if target is None:
                target = known[key] = self._seek(self._contexts[key >> ID_BITS], key & ID_MASK)
            found.append(target)
        return np.array(found, dtype=np.int64)[inverse_A].reshape(keys_A.shape)

    def _seek(self, context: Context, token: int) -> int:
        content = self.pair.source[token]
        if not content or token == self.pair.source_end_of_turn:
            return RULED_OUT if context.done else self._event(token)
        written = context.lead + (content.removeprefix(b" ") if context.drops_space else content)
        if context.done and not (written.startswith(context.done) and len(written) > len(context.done)):
            return RULED_OUT
        if self._same_vocabulary and not context.done and context.drops_space == bool(context.lead):
            return token
        return self.target(written, context.done) if len(written) > len(context.lead) else UNMAPPED

    def _event(self, token: int) -> int:
        return int(self.pair.equal_ids[token]) if token < len(self.pair.source) else UNMAPPED

    def _number(self, context: Context) -> int:
        number = self._number_of.setdefault(context, len(self._contexts))
        if number == len(self._contexts):
            self._contexts.append(context)
        return number

    def _forget_much(self) -> None:
        """Targets follow from their keys alone, so nothing but time is lost."""
        if len(self._target_of) > REMEMBERED:
            self._forget()

    def _forget(self) -> None:
        self._contexts, self._number_of, self._target_of = [], {}, {}


def _spelled(table: TokenBytes, rows: Rows) -> np.ndarray:
    """int64 [N]: bytes of text that the token predicted at each row spells, a space that is not in the text apart."""
    return _width(table, rows) - _absent_space(table, rows)


def _width(table: TokenBytes, rows: Rows) -> np.ndarray:
    known_N = (rows.next >= 0) & (rows.next < len(table))
    return np.where(known_N, table.width[np.where(known_N, rows.next, 0)], 0)


def _absent_space(table: TokenBytes, rows: Rows) -> np.ndarray:
    """bool [N]: the token predicted at each row starts with a space that is not in the text (a dummy prefix)."""
    width_N, ends_N = _width(table, rows), rows.ends
    known_N = (ends_N >= 0) & (np.append(ends_N[1:], UNALIGNED) >= 0)[: len(ends_N)]
    short_N = known_N & (width_N > 0) & (np.append(np.diff(ends_N), 0)[: len(ends_N)] == width_N - 1)
    for row in np.flatnonzero(short_N).tolist():
        short_N[row] = table[int(rows.next[row])].startswith(b" ")
    return short_N


def _normalised(logs_RK: np.ndarray) -> np.ndarray:
    """Log-probabilities that sum to 1 in each row that has any mass."""
    peak_R1 = logs_RK.max(axis=1, initial=-np.inf, keepdims=True)
    peak_R1[peak_R1 == -np.inf] = 0.0
    with np.errstate(divide="ignore"):
        total_R1 = np.log(np.exp(logs_RK - peak_R1).sum(axis=1, keepdims=True)) + peak_R1
    return np.where(logs_RK > -np.inf, logs_RK - np.where(total_R1 > -np.inf, total_R1, 0.0), -np.inf)
