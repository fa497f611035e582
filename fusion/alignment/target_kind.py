"""What a row of targets says, and how a model's own row and the reference token are said in the same way.

An alignment decides it: distributions over pivot tokens, sorted probabilities without tokens (`uld`), or likelihoods
of spans (`alm`). Fusion mixes rows of one kind, and training takes the loss that belongs to it.
Array legend: R rows, K candidates.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fusion.config import UserError
from fusion.teaching.sparse_rows import SparseRows, loose_rows
from fusion.teaching.store import TeacherRows

DISTRIBUTION, RANKS, SPANS = "distribution", "ranks", "spans"


@dataclass(frozen=True)
class TargetKind:
    """`distribution`: ids are pivot tokens, weights probabilities; what lacks to 1 is the mass of all other tokens.

    `ranks`: id k stands for the (k + 1)-th most likely token, whichever that is; weights are its probability.
    `spans`: a row has one entry; its id is the number of the first row of its span, the same in all rows of the span,
    and its weight is the likelihood of the span's text to the power 1 / temperature.
    """

    name: str = DISTRIBUTION
    temperature: float = 1.0
    """Of `spans`: how far likelihoods are drawn towards 1 before they are compared."""

    def own(self, teacher: TeacherRows) -> SparseRows:
        """The pivot's own rows, which need no alignment; each row of `spans` is a span of its own."""
        rows, width = teacher.ids_RK.shape
        if self.name == SPANS:
            return _one_entry(np.arange(rows), np.exp(-teacher.nll_R.astype(np.float64) / self.temperature))
        ids_RK = teacher.ids_RK if self.name == DISTRIBUTION else np.tile(np.arange(width), (rows, 1))
        weights_RK = np.exp(teacher.logprobs_RK.astype(np.float64))
        return loose_rows(np.repeat(np.arange(rows), width), ids_RK.ravel(), weights_RK.ravel(), rows)

    def certain(self, references_R: np.ndarray) -> SparseRows:
        """Rows that are certain of the reference tokens."""
        rows = len(references_R)
        ids_R = {DISTRIBUTION: references_R, RANKS: np.zeros(rows, dtype=np.int64), SPANS: np.arange(rows)}[self.name]
        return _one_entry(ids_R, np.ones(rows))

    def to_json(self) -> dict[str, object]:
        return {"name": self.name, "temperature": self.temperature}

    @classmethod
    def from_json(cls, description: Mapping[str, object]) -> "TargetKind":
        """Raises UserError for a description that this program did not write."""
        if description.get("name") not in (DISTRIBUTION, RANKS, SPANS):
            raise UserError(f"targets of kind {description.get('name')!r} are not known; prepare them again")
        return cls(str(description["name"]), float(str(description["temperature"])))


def _one_entry(ids_R: np.ndarray, weights_R: np.ndarray) -> SparseRows:
    return loose_rows(np.arange(len(ids_R)), ids_R, weights_R, len(ids_R))
