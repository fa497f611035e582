"""What a teacher says at the supervised rows of one dialogue. Array legend: R supervised rows, K candidates."""

from dataclasses import dataclass

import numpy as np

TOLERANCE = 1e-2
"""How far the masses of candidates and tail may be from 1 together."""


@dataclass(frozen=True)
class TeacherRows:
    """What one model says at the supervised rows of one dialogue.

    Rows may have fewer candidates than there are columns: the rest of the row is -1 in the ids and -inf in the
    log-probabilities.
    """

    ids_RK: np.ndarray
    """int32 candidate ids, most likely first, the lower id first among equals."""
    logprobs_RK: np.ndarray
    """float32 log-probabilities of the candidates, in nats."""
    tail_R: np.ndarray
    """float32 probability mass outside the candidates."""
    nll_R: np.ndarray
    """float32 negative log-likelihood of the reference token, in nats."""
    exact_nll: float | None = None
    """Sum of the rows' NLLs, in nats, where `nll_R` was rounded by the store; None: `nll_R` is as it was computed."""

    @property
    def counts_R(self) -> np.ndarray:
        """int64 candidates of every row."""
        return (self.ids_RK >= 0).sum(-1)

    @property
    def total_nll(self) -> float:
        """Negative log-likelihood of all references, in nats: the same number whatever the store."""
        return float(self.nll_R.sum(dtype=np.float64)) if self.exact_nll is None else self.exact_nll


def filled(held: np.ndarray, entries_E: np.ndarray, filler: float) -> np.ndarray:
    """An array shaped as the mask `held`: its entries in order where it is true, `filler` elsewhere."""
    if len(entries_E) == held.size:
        return entries_E.reshape(held.shape)
    array = np.full(held.shape, filler, dtype=entries_E.dtype)
    array[held] = entries_E
    return array


def check_candidates(rows: TeacherRows, highest_id: int) -> None:
    """ValueError when rows are no distributions: candidates in order and before the padding, mass 1 with the tail."""
    held_RK = rows.ids_RK >= 0
    masses_R = np.exp(rows.logprobs_RK, where=held_RK, out=np.zeros(held_RK.shape)).sum(-1) + rows.tail_R
    problems = {
        "a row has no candidate": (~held_RK[:, :1]).any(),
        "padding stands before a candidate": (held_RK[:, 1:] > held_RK[:, :-1]).any(),
        "candidates are not the most likely first": (rows.logprobs_RK[:, 1:] > rows.logprobs_RK[:, :-1]).any(),
        f"an id is above {highest_id}": rows.ids_RK.max(initial=0) > highest_id,
        "candidates and tail are not 1 together": not (np.abs(masses_R - 1) < TOLERANCE).all(),
        "a tail is negative": (rows.tail_R < 0).any(),
        "an NLL is no number": not np.isfinite(rows.nll_R).all(),
    }
    if any(problems.values()):
        raise ValueError("these are no teacher rows: " + "; ".join(text for text, wrong in problems.items() if wrong))
