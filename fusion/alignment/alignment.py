"""A token alignment: how a source's distributions become distributions over the pivot's tokens.

Legend: R rows of the pivot, S rows of the source, K tokens of a source row's support, E entries of all rows together.
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
from fusion.alignment.statistics import MappingStatistics
from fusion.alignment.vocabularies import UNMAPPED, VocabularyPair
from fusion.config import UserError

STRATEGIES = "fusion.alignment.strategies"


class MappedRows(NamedTuple):
    """Distributions in compressed rows: row r has entries `indptr[r]:indptr[r + 1]`, none or weights that sum to 1."""

    indptr: np.ndarray
    """int64 [R + 1]."""
    ids: np.ndarray
    """int32 [E]: distinct pivot ids within a row, in the order of the source's support."""
    weights: np.ndarray
    """float64 [E]."""


class Alignment(ABC):
    """One strategy on one pair of vocabularies: which source row speaks for a pivot row, what its tokens become."""

    def __init__(self, pair: VocabularyPair) -> None:
        self.pair = pair

    @abstractmethod
    def align(self, pivot: Rows, source: Rows) -> np.ndarray:
        """int32 [R]: index of the source row that speaks for each pivot row, negative where none does."""

    @abstractmethod
    def targets(self, source_ids: np.ndarray) -> np.ndarray:
        """int32, the shape of `source_ids` (ids within the source's table): the pivot id of each, -1 to drop it."""

    def map_support(self, ids_SK: ArrayLike, logprobs_SK: ArrayLike, rows_R: ArrayLike) -> MappedRows:
        """The distribution of source row `rows_R[r]` over pivot tokens, for every pivot row r; empty if negative.

        `ids_SK` are source ids (negative ones and rows that the model has beyond its tokeniser are dropped),
        `logprobs_SK` log-probabilities or logits in nats. Masses that meet on one pivot id are summed, then each row
        is scaled to 1 over what was mapped.
        """
        return mapped_rows(*self._mapped(ids_SK, logprobs_SK, rows_R))

    def map_rows(
        self,
        pivot_ids: ArrayLike,
        source_ids: ArrayLike,
        source_topk_ids_SK: ArrayLike,
        source_topk_logits_SK: ArrayLike,
    ) -> MappedRows:
        """(indptr, ids, weights) over all positions of two token sequences of one text; S is `len(source_ids)`."""
        rows_R = self.align(*self.pair.rows(pivot_ids, source_ids))
        return self.map_support(source_topk_ids_SK, source_topk_logits_SK, rows_R)

    def _mapped(self, ids_SK: ArrayLike, logprobs_SK: ArrayLike, rows_R: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        """Pivot ids and log masses of every pivot row's support, [R, K] each; -1 and -inf where there is none."""
        rows = np.asarray(rows_R, dtype=np.int64)
        spoken = np.flatnonzero(rows >= 0)
        ids_AK = np.asarray(ids_SK, dtype=np.int64)[rows[spoken]]
        known = (ids_AK >= 0) & (ids_AK < len(self.pair.source))
        targets_RK = np.full((len(rows), ids_AK.shape[1]), UNMAPPED, dtype=np.int32)
        targets_RK[spoken] = np.where(known, self.targets(np.where(known, ids_AK, 0)), UNMAPPED)
        masses_RK = np.full(targets_RK.shape, -np.inf)
        masses_RK[spoken] = np.asarray(logprobs_SK, dtype=np.float64)[rows[spoken]]
        return targets_RK, masses_RK


def mapped_rows(targets_RK: np.ndarray, logs_RK: np.ndarray, add_up: bool = True) -> MappedRows:
    """Rows of distinct ids, each row scaled to 1; ids of -1 and masses of zero (or NaN) are left out.

    The first of several entries with one id keeps its place, and gets the mass of the others if they `add_up`.
    """
    kept_RK = (targets_RK >= 0) & (logs_RK > -np.inf)
    peak_R1 = np.where(kept_RK, logs_RK, -np.inf).max(axis=1, initial=-np.inf, keepdims=True)
    masses_RK = np.exp(np.subtract(logs_RK, peak_R1, out=np.full(logs_RK.shape, -np.inf), where=kept_RK))
    _unite(targets_RK, masses_RK, add_up)
    kept_RK = masses_RK > 0
    indptr = np.concatenate([[0], np.cumsum(kept_RK.sum(axis=1))]).astype(np.int64)
    scale_R1 = masses_RK.sum(axis=1, keepdims=True)
    weights_RK = np.divide(masses_RK, scale_R1, out=masses_RK, where=kept_RK)
    return MappedRows(indptr, targets_RK[kept_RK].astype(np.int32), weights_RK[kept_RK])


@njit(cache=True, nogil=True)
def _unite(targets_RK: np.ndarray, masses_RK: np.ndarray, add_up: bool) -> None:
    """Give the mass of repeated ids to the first entry with that id, or drop it; in place."""
    for row in range(targets_RK.shape[0]):
        for later in range(1, targets_RK.shape[1]):
            for first in range(later):
                if targets_RK[row, first] == targets_RK[row, later] and masses_RK[row, first] > 0:
                    if add_up:
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
    **options: Any,
) -> Alignment:
    """The strategy of `name`: a module of `fusion.alignment.strategies`, or the dotted path of a module of your own.

    The module defines `build(pair, statistics, **options) -> Alignment`. An end of turn that is not given is the
    tokeniser's end of sequence.

    Raises:
        UserError: an unknown strategy or option, a tokeniser without a byte table, statistics missing or of others.
    """
    build = strategy_builder(name, options)
    pair = VocabularyPair.of(pivot_tokenizer, source_tokenizer, pivot_end_of_turn, source_end_of_turn)
    if statistics is not None:
        statistics.require_same(statistics.path, pair, f"alignment={name}")
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
