"""A token alignment: how a source's distributions become distributions over the pivot's tokens.

Legend: R rows of the pivot, S rows of the source (all of a dialogue, or the stored ones), K candidates of a row,
E entries of all rows together.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from pkgutil import iter_modules
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import ArrayLike

from fusion.alignment.rows import Rows
from fusion.alignment.sequence import SequencePath, sequence_path
from fusion.alignment.statistics import MappingStatistics
from fusion.alignment.target_kind import TargetKind
from fusion.alignment.vocabularies import BYTES, UNMAPPED, VocabularyPair
from fusion.config import UserError
from fusion.teaching.sparse_rows import SparseRows, loose_rows
from fusion.teaching.store import TeacherRows

STRATEGIES = "fusion.alignment.strategies"


class MappedRows(NamedTuple):
    """Distributions in compressed rows: row r has entries `indptr[r]:indptr[r + 1]`, none or weights that sum to 1."""

    indptr: np.ndarray
    """int64 [R + 1]."""
    ids: np.ndarray
    """int32 [E]: distinct pivot ids within a row, in the order of the source's support."""
    weights: np.ndarray
    """float64 [E]."""


class Spoken(NamedTuple):
    """What a source says at chosen rows of the pivot."""

    rows_R: np.ndarray
    """int32 [R]: the source row that speaks for each pivot row; negative: none, and it may be one that is not stored.
    """
    targets: SparseRows
    """R rows, not scaled: a row's sum is the teacher mass that got a target."""


class Support(NamedTuple):
    """Candidates of rows; one that is missing has id -1 or no mass."""

    ids_RK: np.ndarray
    """int64: ids of the source, or pivot ids once they are translated."""
    logs_RK: np.ndarray
    """float64 log-probabilities or logits, in nats."""


class Alignment(ABC):
    """One strategy on one pair of vocabularies: which source row speaks for a pivot row, what its tokens become."""

    kind: TargetKind = TargetKind()
    """What the weights of `speak` mean."""
    sums_masses: bool = True
    """Whether masses that meet on one pivot token are summed, or all but the first are lost."""

    def __init__(self, pair: VocabularyPair) -> None:
        self.pair = pair
        self.sequence: SequencePath = sequence_path(pair)

    @abstractmethod
    def align(self, pivot: Rows, source: Rows) -> np.ndarray:
        """int32 [R]: index of the source row that speaks for each pivot row, negative where none does.

        `pivot` and `source` are all rows of one dialogue.
        """

    @abstractmethod
    def targets(self, source_ids: np.ndarray) -> np.ndarray:
        """int32, the shape of `source_ids` (ids within the source's table): the pivot id of each, -1 to drop it."""

    def speak(
        self, pivot: Rows, source: Rows, teacher: TeacherRows, wanted_R: np.ndarray, stored_S: np.ndarray
    ) -> Spoken:
        """The source's targets at the pivot's rows `wanted_R` (positions int64 [R]) of one dialogue.

        `pivot` and `source` are all rows of the dialogue; row i of `teacher` is the source's row `stored_S[i]`.
        Weights are probabilities as the teacher gave them. A row whose source row is not stored is empty.
        """
        rows_R = self.align(pivot, source)[wanted_R]
        support = _gather(teacher.ids_RK, teacher.logprobs_RK, _places(stored_S, len(source))[np.maximum(rows_R, -1)])
        return Spoken(rows_R, _unscaled(self.translate(pivot, source, wanted_R, rows_R, support), self.sums_masses))

    def translate(
        self, pivot: Rows, source: Rows, wanted_R: np.ndarray, rows_R: np.ndarray, support: Support
    ) -> Support:
        """Pivot ids instead of the source's, -1 where a candidate is dropped; masses may become conditional ones.

        `support` [R, K] are the candidates of source rows `rows_R`, which speak for the pivot's rows `wanted_R`.
        """
        return self._mapped(support)

    def map_support(self, ids_SK: ArrayLike, logprobs_SK: ArrayLike, rows_R: ArrayLike) -> MappedRows:
        """The distribution of source row `rows_R[r]` over pivot tokens, for every pivot row r; empty if negative.

        `ids_SK` are source ids (negative ones and rows that the model has beyond its tokeniser are dropped),
        `logprobs_SK` log-probabilities or logits in nats. Masses that meet on one pivot id are summed, then each row
        is scaled to 1 over what was mapped. Rows are taken to have read the same text, with no token begun.
        """
        support = _gather(ids_SK, logprobs_SK, np.asarray(rows_R, dtype=np.int64))
        return mapped_rows(self._mapped(support), self.sums_masses)

    def map_rows(
        self,
        pivot_ids: ArrayLike,
        source_ids: ArrayLike,
        source_topk_ids_SK: ArrayLike,
        source_topk_logits_SK: ArrayLike,
    ) -> MappedRows:
        """(indptr, ids, weights) over all positions of two token sequences of one text; S is `len(source_ids)`."""
        return mapped_rows(
            self._all_rows(pivot_ids, source_ids, source_topk_ids_SK, source_topk_logits_SK)[1], self.sums_masses
        )

    def _all_rows(
        self, pivot_ids: ArrayLike, source_ids: ArrayLike, ids_SK: ArrayLike, logs_SK: ArrayLike
    ) -> tuple[np.ndarray, Support]:
        """The source row and the translated candidates of every position of the pivot."""
        pivot, source = self.pair.rows(pivot_ids, source_ids)
        rows_R = self.align(pivot, source)
        support = _gather(ids_SK, logs_SK, rows_R)
        return rows_R, self.translate(pivot, source, np.arange(len(pivot)), rows_R, support)

    def _mapped(self, support: Support) -> Support:
        known_RK = (support.ids_RK >= 0) & (support.ids_RK < len(self.pair.source))
        targets_RK = self.targets(np.where(known_RK, support.ids_RK, 0))
        return Support(np.where(known_RK, targets_RK, UNMAPPED).astype(np.int64), support.logs_RK)


def _places(stored_S: np.ndarray, num_rows: int) -> np.ndarray:
    """int64 [num_rows + 1]: the number of every source row among the stored ones, else -1; so for row -1, "none"."""
    places = np.full(num_rows + 1, -1, dtype=np.int64)
    places[stored_S] = np.arange(len(stored_S))
    return places


def _gather(ids_SK: ArrayLike, logs_SK: ArrayLike, rows_R: np.ndarray) -> Support:
    """The candidates of rows `rows_R`; negative rows have none."""
    ids = np.asarray(ids_SK, dtype=np.int64)
    ids_RK = np.full((len(rows_R), ids.shape[1]), -1, dtype=np.int64)
    logs_RK = np.full(ids_RK.shape, -np.inf)
    given = np.flatnonzero(rows_R >= 0)
    ids_RK[given], logs_RK[given] = ids[rows_R[given]], np.asarray(logs_SK, dtype=np.float64)[rows_R[given]]
    logs_RK[(ids_RK < 0) | np.isnan(logs_RK)] = -np.inf
    return Support(ids_RK, logs_RK)


def _unscaled(support: Support, sums_masses: bool) -> SparseRows:
    """Rows of the candidates that have an id; masses stay as they are."""
    masses_RK = np.where(support.ids_RK >= 0, np.exp(support.logs_RK), 0.0)
    if not sums_masses:
        _unite(support.ids_RK, masses_RK, sums_masses)
    rows, width = masses_RK.shape
    return loose_rows(np.repeat(np.arange(rows), width), support.ids_RK.ravel(), masses_RK.ravel(), rows)


def mapped_rows(support: Support, sums_masses: bool = True) -> MappedRows:
    """Rows of distinct ids, each row scaled to 1; negative ids and candidates without mass are left out.

    The first of several entries with one id keeps its place, and gets the mass of the others if that is summed.
    """
    ids_RK, logs_RK = support
    kept_RK = (ids_RK >= 0) & (logs_RK > -np.inf)
    peak_R1 = np.where(kept_RK, logs_RK, -np.inf).max(axis=1, initial=-np.inf, keepdims=True)
    masses_RK = np.exp(np.subtract(logs_RK, peak_R1, out=np.full(logs_RK.shape, -np.inf), where=kept_RK))
    _unite(ids_RK, masses_RK, sums_masses)
    kept_RK = masses_RK > 0
    indptr = np.concatenate([[0], np.cumsum(kept_RK.sum(axis=1))]).astype(np.int64)
    scale_R1 = masses_RK.sum(axis=1, keepdims=True)
    weights_RK = np.divide(masses_RK, scale_R1, out=masses_RK, where=kept_RK)
    return MappedRows(indptr, ids_RK[kept_RK].astype(np.int32), weights_RK[kept_RK])


@njit(cache=True, nogil=True)
def _unite(ids_RK: np.ndarray, masses_RK: np.ndarray, sums_masses: bool) -> None:
    """Give the mass of repeated ids to the first entry with that id, or drop it; in place."""
    for row in range(ids_RK.shape[0]):
        for later in range(1, ids_RK.shape[1]):
            for first in range(later):
                if ids_RK[row, first] == ids_RK[row, later] and masses_RK[row, first] > 0:
                    if sums_masses:
                        masses_RK[row, first] += masses_RK[row, later]
                    masses_RK[row, later] = 0.0
                    break


def build_alignment(
    name: str,
    pivot_tokenizer: Any,
    source_tokenizer: Any,
    statistics: MappingStatistics | None = None,
    *,
    pivot_end_of_turn: int | None = None,
    source_end_of_turn: int | None = None,
    path: str | None = None,
    **options: Any,
) -> Alignment:
    """The strategy of `name`: a module of `fusion.alignment.strategies`, or the dotted path of a module of your own.

    The module defines `build(pair, statistics, **options) -> Alignment`. An end of turn that is not given is the
    tokeniser's end of sequence; a `path` (`bytes` or `dtw`) that is not given is that of the statistics, else `bytes`.

    Raises:
        UserError: an unknown strategy, path or option, a tokeniser without a byte table, statistics missing, of other
            vocabularies or of another path.
    """
    build = strategy_builder(name, options)
    if path is None:
        path = statistics.path if statistics is not None else BYTES
    tokenizers, ends = (pivot_tokenizer, source_tokenizer), (pivot_end_of_turn, source_end_of_turn)
    pair = VocabularyPair.of(*tokenizers, *ends, path)
    if statistics is not None:
        statistics.require_same(path, pair, f"alignment={name}")
    return build(pair, statistics, **options)


def strategy_builder(name: str, options: Mapping[str, Any]) -> Callable[..., Alignment]:
    """The `build` function of a strategy; raises UserError for an unknown strategy or option, before any work."""
    build = _strategy(name).build
    _refuse_unknown_options(name, list(inspect.signature(build).parameters)[2:], list(options))
    return build


def _strategy(name: str) -> ModuleType:
    module = name if "." in name else f"{STRATEGIES}.{name}"
    if _exists(module):
        return import_module(module)
    names = sorted(found.name for found in iter_modules(import_module(STRATEGIES).__path__))
    raise UserError(f"alignment={name}: there is no such strategy{_nearest(name, names)}")


def _exists(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _refuse_unknown_options(name: str, known: list[str], given: list[str]) -> None:
    unknown = [option for option in given if option not in known]
    if unknown:
        raise UserError([f"alignment={name}: unknown option {option}{_nearest(option, known)}" for option in unknown])


def _nearest(word: str, known: list[str]) -> str:
    close = get_close_matches(word, known, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"{hint} (there are: {', '.join(known) or 'none'})"
