"""Fusion: per unit the fusion function weighs the models, per row what they say becomes one sparse target.

Array legend: M models (the pivot first), U units, R supervised rows of the pivot, E entries.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module

import numpy as np

from fusion.alignment.target_kind import SPANS, TargetKind
from fusion.config import UserError
from fusion.objective.target_form import TargetForm
from fusion.objective.units import Units
from fusion.teaching.sparse_rows import SparseRows, loose_rows
from fusion.teaching.store import TeacherRows

FusionFunction = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Vote:
    """One model's rows on the pivot's positions, not scaled; a row that is empty has nothing to say."""

    name: str
    rows: SparseRows


@dataclass(frozen=True)
class FusedDialogue:
    rows: SparseRows
    winner: str
    """The model with the largest share of rows; ties go to the pivot."""
    fallback_rows: int
    """Rows that no chosen model could speak for."""
    rows_won: dict[str, float]
    """Rows that the fusion function gave to every model, shares of rows added up."""


def fusion_function(name: str) -> FusionFunction:
    """The function of that name in `fusion.objective.fusion_functions`, or at that dotted path.

    Raises:
        UserError: there is no such module or function.
    """
    module, _, function = name.rpartition(".")
    try:
        found = getattr(import_module(module or f"fusion.objective.fusion_functions.{name}"), function)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"fusion.name={name}: there is no such fusion function ({error})") from error
    if not callable(found):
        raise UserError(f"fusion.name={name}: this is no function, but of type {type(found).__name__}")
    return found


def pivot_vote(name: str, teacher: TeacherRows, kind: TargetKind) -> Vote:
    """The pivot's own candidates, said in the way of `kind`."""
    return Vote(name, kind.own(teacher))


def fuse(
    votes_M: Sequence[Vote],
    units: Units,
    references_R: np.ndarray,
    function: FusionFunction,
    fallback: str,
    form: TargetForm,
) -> FusedDialogue:
    """Mix the votes by the shares that `function` gives them in every unit; the first vote is the pivot's.

    A row is mixed by the models that have one, in the proportion of their shares. Where no model with a share has a
    row, `fallback` decides: gold is certain of the reference token (as the authors do), pivot is the pivot's own row,
    skip leaves the row empty.

    Raises:
        UserError: the function's shares are none, or it mixes models whose targets cannot be mixed.
    """
    shares_UM = _shares(function, units.ce_UM)
    if ((shares_UM > 0) & (shares_UM < 1)).any():
        form.refuse_mixture()
    rows_M = [form.ready_to_mix(vote.rows) for vote in votes_M]
    voices_RM = _voices(shares_UM[units.of_R], rows_M, form.kind)
    silent_R = np.logical_not(voices_RM.any(axis=1))
    spoken: list[tuple[SparseRows, np.ndarray]] = [(rows, voices_RM[:, number]) for number, rows in enumerate(rows_M)]
    if fallback == "gold":
        spoken.append((form.kind.certain(references_R), silent_R))
    elif fallback == "pivot":
        spoken.append((rows_M[0], silent_R))
    won_M = np.bincount(units.of_R, minlength=len(shares_UM)) @ shares_UM
    return FusedDialogue(
        _mixed(spoken, len(references_R)),
        votes_M[int(np.argmax(won_M))].name,
        int(silent_R.sum()),
        {vote.name: float(won) for vote, won in zip(votes_M, won_M, strict=True)},
    )


def _shares(function: FusionFunction, ce_UM: np.ndarray) -> np.ndarray:
    """float64 [U, M]: what `function` says, checked."""
    given = function(ce_UM)
    try:
        shares_UM = np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError):
        shares_UM = np.zeros(0)
    if shares_UM.shape != ce_UM.shape:
        found = f"gave {given!r}" if shares_UM.ndim < 2 else f"gave shares of the shape {list(shares_UM.shape)}"
        raise UserError(
            f"fusion.name: for cross-entropies of the shape {list(ce_UM.shape)} (units, models; the pivot first) the "
            f"fusion function {found}; it has to give one share per unit and model"
        )
    wrong_U = ~((shares_UM >= 0).all(axis=1) & np.isclose(shares_UM.sum(axis=1), 1))
    if wrong_U.any():
        unit = int(np.argmax(wrong_U))
        raise UserError(
            f"fusion.name: for the cross-entropies {ce_UM[unit].tolist()} the fusion function gave "
            f"{shares_UM[unit].tolist()}; the shares of a unit must not be negative, and their sum has to be 1"
        )
    return shares_UM


def _voices(shares_RM: np.ndarray, rows_M: Sequence[SparseRows], kind: TargetKind) -> np.ndarray:
    """float64 [R, M]: the models' shares of every row among those that say something there; all 0 where none does."""
    voices_RM = shares_RM * ~np.column_stack([rows.is_empty_R for rows in rows_M])
    if kind.name == SPANS:
        for number, rows in enumerate(rows_M):
            voices_RM[_in_broken_spans(rows, voices_RM[:, number] > 0), number] = 0
    total_R1 = voices_RM.sum(axis=1, keepdims=True)
    return np.divide(voices_RM, total_R1, out=np.zeros_like(voices_RM), where=total_R1 > 0)


def _in_broken_spans(rows: SparseRows, chosen_R: np.ndarray) -> np.ndarray:
    """int64: rows whose span is not chosen as a whole; its likelihood says nothing about a part of its text."""
    row_E = rows.row_of_E
    broken = rows.ids_E[~chosen_R[row_E]]
    return row_E[np.isin(rows.ids_E, broken)]


def _mixed(spoken: Sequence[tuple[SparseRows, np.ndarray]], num_rows: int) -> SparseRows:
    """The sum of sparse rows, each row times its factor [R]."""
    parts = []
    for rows, factor_R in spoken:
        if factor_R.any():
            row_E = rows.row_of_E
            parts.append((row_E, rows.ids_E, rows.weights_E * factor_R[row_E].astype(np.float64)))
    if not parts:
        nothing = np.zeros(0, dtype=np.int64)
        parts.append((nothing, nothing, nothing.astype(np.float64)))
    row_E, ids_E, weights_E = (np.concatenate(column) for column in zip(*parts, strict=True))
    return loose_rows(row_E, ids_E, weights_E, num_rows)


def is_kept(content_hash: str, share: float) -> bool:
    """Whether a dialogue that the pivot won stays in training; drawn by its hash, so every run agrees."""
    draw = int.from_bytes(hashlib.sha256(f"keep_pivot_won:{content_hash}".encode()).digest()[:8], "big")
    return draw < share * 2**64
