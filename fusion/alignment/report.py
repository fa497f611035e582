"""What is told of an alignment: how many rows got what, by the relation of the cuts and by the kind of text.

Everything is kept as counts and sums, so that the tallies of shards add up.
Legend: R supervised rows of the pivot, L relations, C categories.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

import numpy as np

from fusion.alignment.categories import CATEGORIES
from fusion.alignment.relations import RELATIONS, UNPROVEN

SHAPE = len(RELATIONS), len(CATEGORIES)


def _counts() -> np.ndarray:
    return np.zeros(SHAPE, dtype=np.int64)


@dataclass(frozen=True)
class RowFacts:
    """What is counted of the supervised rows of one dialogue."""

    relation_R: np.ndarray
    """Place in `RELATIONS`."""
    category_R: np.ndarray
    """Place in `CATEGORIES`, of the predicted token."""
    is_aligned_R: np.ndarray
    """bool: a source row that is stored speaks."""
    is_covered_R: np.ndarray
    """bool: it got mass; rows that are not covered fall back."""
    mass_R: np.ndarray
    """float64: sum of the row."""


@dataclass
class Tally:
    """Counts behind the report."""

    rows_LC: np.ndarray = field(default_factory=_counts)
    aligned_LC: np.ndarray = field(default_factory=_counts)
    covered_LC: np.ndarray = field(default_factory=_counts)
    mass_LC: np.ndarray = field(default_factory=lambda: np.zeros(SHAPE))
    """Sums of the aligned rows."""
    dialogues: int = 0
    pivot_offsets: int = 0
    """Dialogues whose places in the pivot's reading come from character offsets, not from exact bytes."""
    source_offsets: int = 0

    def add(self, rows: RowFacts, pivot_exact: bool, source_exact: bool) -> None:
        """Count one dialogue."""
        place_R = rows.relation_R.astype(np.int64) * SHAPE[1] + rows.category_R
        self.rows_LC += _binned(place_R)
        self.aligned_LC += _binned(place_R[rows.is_aligned_R])
        self.covered_LC += _binned(place_R[rows.is_covered_R])
        masses = np.bincount(place_R, rows.mass_R * rows.is_aligned_R, SHAPE[0] * SHAPE[1])
        self.mass_LC += masses.reshape(SHAPE)
        self.dialogues += 1
        self.pivot_offsets += not pivot_exact
        self.source_offsets += not source_exact

    def merge(self, other: "Tally") -> None:
        for name in (item.name for item in fields(self)):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def to_json(self) -> dict[str, object]:
        """Every number exactly."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: np.asarray(value).tolist() for name, value in values.items()}

    @classmethod
    def from_json(cls, values: Mapping[str, object]) -> "Tally":
        """Raises TypeError for keys that are no fields."""
        arrays = {name: np.array(value) if name.endswith("_LC") else value for name, value in values.items()}
        return cls(**arrays)  # type: ignore[arg-type]

    def report(self, has_masses: bool) -> dict[str, object]:
        """Shares of all supervised rows; `mass_kept` is a mean over aligned rows, None where there are no masses.

        `kinds` and `categories` name what occurs; shares within them are of their own rows, `share` is of all rows.
        """
        everything = np.ones(SHAPE, dtype=bool)
        return {
            "supervised_rows": int(self.rows_LC.sum()),
            **self._shares(everything, has_masses),
            "kinds": {
                name: self._part(np.arange(SHAPE[0])[:, None] == number, has_masses)
                for number, name in enumerate(RELATIONS)
                if self.rows_LC[number].any()
            },
            "categories": {
                name: {
                    **self._part(np.arange(SHAPE[1])[None, :] == number, has_masses),
                    "kinds": {
                        kind: int(count)
                        for kind, count in zip(RELATIONS, self.rows_LC[:, number], strict=True)
                        if count
                    },
                }
                for number, name in enumerate(CATEGORIES)
                if self.rows_LC[:, number].any()
            },
            "unproven_rows": int(self.rows_LC[UNPROVEN].sum()),
            "dialogues": self.dialogues,
            "read_by_offsets": {"pivot": self.pivot_offsets, "source": self.source_offsets},
        }

    def _part(self, chosen_LC: np.ndarray, has_masses: bool) -> dict[str, object]:
        chosen_LC = np.broadcast_to(chosen_LC, SHAPE)
        rows = int(self.rows_LC[chosen_LC].sum())
        share = round(rows / max(int(self.rows_LC.sum()), 1), 6)
        return {"rows": rows, "share": share, **self._shares(chosen_LC, has_masses)}

    def _shares(self, chosen_LC: np.ndarray, has_masses: bool) -> dict[str, float | None]:
        rows, aligned, covered = (
            int(counts[chosen_LC].sum()) for counts in (self.rows_LC, self.aligned_LC, self.covered_LC)
        )
        mass = float(self.mass_LC[chosen_LC].sum()) / aligned if has_masses and aligned else None
        return {
            "aligned": round(aligned / max(rows, 1), 6),
            "covered": round(covered / max(rows, 1), 6),
            "mass_kept": None if mass is None else round(mass, 6),
        }


def _binned(place_R: np.ndarray) -> np.ndarray:
    return np.bincount(place_R, minlength=SHAPE[0] * SHAPE[1]).reshape(SHAPE)
