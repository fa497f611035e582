"""Units of fusion: what the fusion function decides at once, and the cross-entropy of every model on it.

Array legend: M models (the pivot first), U units, R supervised tokens of one model (its rows, one token earlier).
"""

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import numpy as np

from fusion.dialogues.encode import Encoded
from fusion.teaching.sparse_rows import SparseRows
from fusion.teaching.store import TeacherRows


class Reading(NamedTuple):
    """How one model reads one dialogue: its supervised tokens, and how much each of them surprises it."""

    ends_R: np.ndarray
    """int64 byte ends in the coordinate of `Encoded.ends_N`, ascending; -1 where no boundary is proven."""
    nll_R: np.ndarray
    """float32 negative log-likelihoods of the tokens, in nats."""
    total_nll: float
    """Their sum, before a store rounded them."""
    num_bytes: int
    """Bytes of all supervised tokens."""

    @classmethod
    def of(cls, encoded: Encoded, teacher: TeacherRows) -> "Reading":
        exact = teacher.exact_nll
        total = float(teacher.nll_R.sum(dtype=np.float64)) if exact is None else exact
        return cls(encoded.ends_N[encoded.rows_R + 1], teacher.nll_R, total, encoded.num_bytes)


class Units(NamedTuple):
    """The units of one dialogue."""

    of_R: np.ndarray
    """int64 [R]: the unit that every row of the pivot belongs to."""
    ce_UM: np.ndarray
    """float64 [U, M]: nats per byte or per token of the unit; infinite where a model has nothing to say."""


def dialogue_units(readings_M: Sequence[Reading], unit: str) -> Units:
    """One unit, as the paper has it; `unit` (byte or token) is what cross-entropies are divided by."""
    sizes_M = [reading.num_bytes if unit == "byte" else len(reading.nll_R) for reading in readings_M]
    ce_M = np.asarray([reading.total_nll for reading in readings_M]) / np.maximum(sizes_M, 1)
    return Units(np.zeros(len(readings_M[0].nll_R), dtype=np.int64), _known(ce_M[None]))


def span_units(readings_M: Sequence[Reading], unit: str) -> Units:
    """Units between the byte boundaries that all models share, so that all of them read the same text in a unit.

    Tokens whose ends are not known belong to the unit around them. What a model reads behind the last shared boundary
    (models may be cut at different bytes) belongs to the last unit; without shared boundaries there is one unit.
    """
    shared_U = reduce(np.intersect1d, [np.unique(reading.ends_R[reading.ends_R > 0]) for reading in readings_M])
    return _units(readings_M, shared_U, unit) if shared_U.size else dialogue_units(readings_M, unit)


def token_units(pivot: Reading, references_R: np.ndarray, sources: Sequence[SparseRows]) -> Units:
    """Every token of the pivot is a unit; a source's cross-entropy is its aligned row's on the pivot's reference.

    `sources` hold probabilities of pivot tokens that were not scaled, so they compare with the pivot's. A source
    without a row, or whose row gives the reference no mass, is infinitely surprised.
    """
    masses = [_mass_of(rows, references_R) for rows in sources]
    with np.errstate(divide="ignore"):
        ce_UM = np.column_stack([pivot.nll_R.astype(np.float64), *(-np.log(mass_R) for mass_R in masses)])
    return Units(np.arange(len(references_R)), _known(ce_UM))


def _units(readings_M: Sequence[Reading], bounds_U: np.ndarray, unit: str) -> Units:
    """Units that end at `bounds_U`, ascending; the last one is open."""
    of_M = [_unit_of(reading.ends_R, bounds_U) for reading in readings_M]
    pairs = list(zip(of_M, readings_M, strict=True))
    nll_MU = [np.bincount(of_R, reading.nll_R.astype(np.float64), len(bounds_U)) for of_R, reading in pairs]
    sizes_MU = [
        _widths(bounds_U, reading.num_bytes) if unit == "byte" else np.bincount(of_R, minlength=len(bounds_U))
        for of_R, reading in pairs
    ]
    return Units(of_M[0], _known(np.column_stack(nll_MU) / np.maximum(np.column_stack(sizes_MU), 1)))


def _unit_of(ends_R: np.ndarray, bounds_U: np.ndarray) -> np.ndarray:
    """int64 [R]: the unit of every token. An unknown end counts as the next known one: no shared boundary, which this
    model would have to know, lies between them."""
    last = np.iinfo(np.int64).max
    next_R = np.minimum.accumulate(np.where(ends_R < 0, last, ends_R)[::-1])[::-1]
    return np.searchsorted(bounds_U, next_R, side="left").clip(max=len(bounds_U) - 1)


def _widths(bounds_U: np.ndarray, num_bytes: int) -> np.ndarray:
    """int64 [U]: bytes of every unit; the last one reaches as far as this model reads."""
    ends_U = np.append(bounds_U[:-1], max(num_bytes, int(bounds_U[-1])))
    return np.diff(ends_U, prepend=0)


def _mass_of(rows: SparseRows, references_R: np.ndarray) -> np.ndarray:
    """float64 [R]: what every row gives to its reference token."""
    row_E = rows.row_of_E
    return np.bincount(row_E, rows.weights_E * (rows.ids_E == references_R[row_E]), len(rows))


def _known(ce_UM: np.ndarray) -> np.ndarray:
    """A model whose likelihood is no number has nothing to say."""
    return np.where(np.isnan(ce_UM), np.inf, ce_UM)
