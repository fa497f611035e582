"""Fusion: per dialogue the fusion function weighs the models, per row their distributions become one sparse target.

Array legend: M models (the pivot first), R supervised rows of the pivot, E entries.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module

import numpy as np

from fusion.config import UserError
from fusion.teaching.sparse_rows import SparseRows, gather_entries
from fusion.teaching.store import TeacherRows

FusionFunction = Callable[[np.ndarray], np.ndarray]
FALLBACKS = ("gold", "pivot", "skip")


@dataclass(frozen=True)
class Vote:
    """One model's rows on the pivot's positions; a row that is empty has nothing to say."""

    name: str
    rows: SparseRows
    ce: float
    """Cross-entropy on the references, in nats per unit."""


@dataclass(frozen=True)
class FusedDialogue:
    rows: SparseRows
    winner: str
    """The model with the largest share; ties go to the pivot."""
    fallback_rows: int
    """Rows that no chosen model could speak for."""


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


def pivot_vote(name: str, teacher: TeacherRows, ce: float) -> Vote:
    """The pivot's own candidates, renormalised."""
    rows, width = teacher.ids_RK.shape
    row_E = np.repeat(np.arange(rows), width)
    weights_E = np.exp(teacher.logprobs_RK).ravel()
    return Vote(name, gather_entries(row_E, teacher.ids_RK.ravel(), weights_E, rows), ce)


def fuse(votes_M: Sequence[Vote], references_R: np.ndarray, function: FusionFunction, fallback: str) -> FusedDialogue:
    """Mix the votes by the shares that `function` gives them; the first vote is the pivot's.

    Where no model with a share has a row, `fallback` decides: gold is one-hot on the reference token (as the authors
    do), pivot is the pivot's own row, skip leaves the row empty.
    """
    shares_M = _shares(function, np.asarray([vote.ce for vote in votes_M], dtype=np.float64))
    chosen = [(share, vote.rows) for share, vote in zip(shares_M, votes_M, strict=True) if share > 0]
    num_rows = len(references_R)
    spoken_R = np.zeros(num_rows, dtype=bool)
    for _, rows in chosen:
        spoken_R |= ~rows.is_empty_R
    silent_R = np.flatnonzero(~spoken_R)
    parts = [(rows.row_of_E, rows.ids_E, share * rows.weights_E) for share, rows in chosen]
    if fallback == "gold":
        parts.append((silent_R, references_R[silent_R], np.ones(len(silent_R))))
    elif fallback == "pivot":
        pivot = votes_M[0].rows
        among = np.isin(pivot.row_of_E, silent_R)
        parts.append((pivot.row_of_E[among], pivot.ids_E[among], pivot.weights_E[among]))
    row_E, ids_E, weights_E = (np.concatenate(column) for column in zip(*parts, strict=True))
    fused = gather_entries(row_E, ids_E, weights_E, num_rows)
    return FusedDialogue(fused, votes_M[int(np.argmax(shares_M))].name, len(silent_R))


def _shares(function: FusionFunction, ce_M: np.ndarray) -> np.ndarray:
    shares_M = np.asarray(function(ce_M), dtype=np.float64)
    if shares_M.shape != ce_M.shape or not (shares_M >= 0).all() or not np.isclose(shares_M.sum(), 1):
        raise UserError(
            f"fusion.name: for the cross-entropies {ce_M.tolist()} the fusion function gave {shares_M.tolist()}; "
            "it has to give one share per model, none negative, with the sum 1"
        )
    return shares_M


def is_kept(content_hash: str, share: float) -> bool:
    """Whether a dialogue that the pivot won stays in training; drawn by its hash, so every run agrees."""
    draw = int.from_bytes(hashlib.sha256(f"keep_pivot_won:{content_hash}".encode()).digest()[:8], "big")
    return draw < share * 2**64
