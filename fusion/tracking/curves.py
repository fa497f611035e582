"""Losses over the steps of a training, as the job's local CSV has them, thinned for drawing."""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

METRICS_FILE = Path("csv") / "metrics.csv"
DRAWN = ("train/loss", "train/ce", "train/fusion", "train/grad_norm", "train/lr")
DIGITS = 5


@dataclass(frozen=True)
class Curve:
    """What one training logged; every metric has a value, or None, per step."""

    steps: tuple[int, ...]
    metrics: Mapping[str, tuple[float | None, ...]]  # by name without "train/", such as "loss"

    def last(self, metric: str) -> float | None:
        return next((value for value in reversed(self.metrics.get(metric, ())) if value is not None), None)

    def thinned(self, num_points: int) -> "Curve":
        """At most `num_points` points: means of runs of neighbours, which stand at their last step."""
        size = max(1, math.ceil(len(self.steps) / num_points))
        starts = range(0, len(self.steps), size)
        return Curve(
            tuple(self.steps[min(start + size, len(self.steps)) - 1] for start in starts),
            {name: tuple(_mean(of[start : start + size]) for start in starts) for name, of in self.metrics.items()},
        )

    def to_json(self) -> dict[str, Any]:
        return {"steps": self.steps, "metrics": {name: [_short(x) for x in of] for name, of in self.metrics.items()}}


def read_curve(folder: Path) -> Curve | None:
    """Of the job in `folder`; None where it logged no loss in a local file."""
    try:
        with (folder / METRICS_FILE).open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row.get("train/loss") and (row["step"] or "").isdigit()]
    except (OSError, csv.Error, UnicodeDecodeError):
        return None
    names = [name for name in DRAWN if any(row.get(name) for row in rows)]
    metrics = {name.removeprefix("train/"): tuple(_number(row.get(name)) for row in rows) for name in names}
    return Curve(tuple(int(row["step"]) for row in rows), metrics) if rows else None


def _number(text: str | None) -> float | None:
    """What a kill has torn, or a training that diverged has logged, is no number."""
    try:
        value = float(text or "nan")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.{DIGITS}g}")
