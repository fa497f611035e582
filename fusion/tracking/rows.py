"""Rows of a comparison: one scored model each, as the jobs of a sweep record them."""

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from fusion.config import UserError, raise_problems

log = logging.getLogger(__name__)

Kind = Literal["pivot", "source", "sft", "target", "merged"]
KINDS: tuple[Kind, ...] = get_args(Kind)
AVERAGE = "average"
RESULT_FILE = "result.json"


@dataclass(frozen=True)
class ComparisonRow:
    """One scored model: one entry of `comparison.json`.

    Rows that differ in nothing but `seed`, `path` and `command` (and `scale`, where it was searched) are repetitions
    of one model. `parameters` must therefore hold settings, not inputs: no paths, no hashes.
    """

    model: str
    kind: Kind
    strategy: str  # the merge method; "" for models that were not merged
    seed: int | None
    path: str
    scores: Mapping[str, float | None]  # fractions of 1, by skill, and "average"
    nll_per_byte: float | None  # nats
    search_value: float | None = None  # what a search over settings lowers; nats per byte
    scale: float | None = None  # of the merged delta
    scale_searched: bool = False
    coefficients: Mapping[str, float | None] = field(default_factory=dict)  # mean over tensors, by target
    num_items: Mapping[str, int] = field(default_factory=dict)  # scored questions, by skill
    command: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    strong_skills: Sequence[str] = ()  # sources and targets: what their source is strong in
    alignment: Mapping[str, Any] = field(default_factory=dict)  # targets: stage 1's report of alignment and fusion
    samples: Sequence[Mapping[str, str]] = ()  # answers that were written out: category, question, reference, answer

    def to_json(self) -> dict[str, Any]:
        """Every field as plain JSON; numbers that are not finite become null."""
        return {item.name: _plain(getattr(self, item.name)) for item in fields(self)}

    @classmethod
    def from_json(cls, value: object, where: str) -> "ComparisonRow":
        """The row in `value`; keys that are not fields are ignored. Raises `UserError` with every problem found."""
        row = _plain(value)
        raise_problems([f"{where}: {problem}; score this job again" for problem in _problems(row)])
        known = {item.name for item in fields(cls)}
        row = {key: content for key, content in row.items() if key in known}
        lists = {name: tuple(row.get(name, ())) for name in ("strong_skills", "samples")}
        return cls(**{**row, **lists})

    @property
    def identity(self) -> tuple[object, ...]:
        """What two records of the same scored model share."""
        return (self.kind, self.model, self.strategy, self.seed, self.path)


@dataclass(frozen=True)
class FailedJob:
    """A job of the sweep that has no scores to compare."""

    job: str  # its folder, seen from the folder that holds the sweep
    status: str
    reason: str


def _plain(value: object) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(content) for key, content in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(content) for content in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, str | int | float) else str(value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_fraction(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and 0 <= value <= 1 + 1e-9)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and value >= 0


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_object(value: object) -> bool:
    return isinstance(value, Mapping)


def _is_number_or_null(value: object) -> bool:
    return value is None or _is_number(value)


def _each(check: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, Mapping) and all(map(check, value.values()))


REQUIRED = ("model", "kind", "strategy", "seed", "path", "scores", "nll_per_byte")
_CHECKS: dict[str, tuple[Callable[[object], bool], str]] = {
    "model": (_is_text, "text"),
    "kind": (lambda value: value in KINDS, f"one of {', '.join(KINDS)}"),
    "strategy": (_is_text, "text"),
    "seed": (lambda value: value is None or isinstance(value, int), "a whole number or null"),
    "path": (_is_text, "text"),
    "scores": (_each(_is_fraction), "an object of fractions of 1, or null for skills without a score"),
    "nll_per_byte": (_is_number_or_null, "a number or null"),
    "search_value": (_is_number_or_null, "a number or null"),
    "scale": (_is_number_or_null, "a number or null"),
    "coefficients": (_each(_is_number_or_null), "an object of numbers"),
    "num_items": (_each(_is_count), "an object of whole numbers"),
    "command": (_is_text, "text"),
    "parameters": (_is_object, "an object"),
    "alignment": (_is_object, "an object"),
    "samples": (
        lambda value: isinstance(value, list) and all(map(_each(_is_text), value)),
        "a list of objects of texts",
    ),
    "strong_skills": (lambda value: isinstance(value, list) and all(map(_is_text, value)), "a list of skills"),
}


def _problems(row: object) -> list[str]:
    if not isinstance(row, Mapping):
        return [f"a row must be an object with keys, not {str(row)[:60]!r}"]
    problems = [f"key '{key}' is missing" for key in REQUIRED if key not in row]
    return problems + [
        f"key '{key}' must be {wanted}, not {str(row[key])[:60]!r}"
        for key, (holds, wanted) in _CHECKS.items()
        if key in row and not holds(row[key])
    ]


def read_rows(folder: Path) -> list[ComparisonRow]:
    """Rows of every finished job at or below `folder`, one per scored model, in the order of the jobs' paths."""
    return read_runs([folder])[0]


def read_runs(folders: Sequence[Path]) -> tuple[list[ComparisonRow], list[FailedJob]]:
    """Rows of the finished jobs at or below `folders`, and the jobs that have none to give.

    Jobs are read in the order of `folders`, then of their paths. A model that several jobs scored (the pivot, say)
    is kept once, as the first job recorded it.
    """
    rows: dict[tuple[object, ...], ComparisonRow] = {}
    failures: list[FailedJob] = []
    for job, file in result_files(folders).items():
        found = _read_job(job, file)
        if isinstance(found, FailedJob):
            log.warning("%s left out of the comparison: %s, %s", found.job, found.status, found.reason)
            failures.append(found)
            continue
        for row in found:
            kept = rows.setdefault(row.identity, row)
            if row.alignment and not kept.alignment:
                rows[row.identity] = replace(kept, alignment=row.alignment)
            if kept.scores != row.scores:
                log.warning("%s scored %s otherwise than an earlier job did; kept the earlier scores", job, row.model)
    return list(rows.values()), failures


def result_files(folders: Sequence[Path]) -> dict[str, Path]:
    """Job name -> its result.json. Folders that are still being built have hidden names."""
    files: dict[Path, str] = {}
    for folder in (path.resolve() for path in folders):
        for file in sorted(folder.rglob(RESULT_FILE)):
            if not any(part.startswith(".") for part in file.relative_to(folder).parts):
                files.setdefault(file, file.parent.relative_to(folder.parent).as_posix())
    names = list(files.values())
    return {(name if names.count(name) == 1 else str(file.parent)): file for file, name in files.items()}


def _read_job(job: str, file: Path) -> list[ComparisonRow] | FailedJob:
    try:
        result = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        return FailedJob(job, "unreadable", f"{RESULT_FILE}: {error}")
    if not isinstance(result, Mapping) or not isinstance(result.get("comparison", []), list):
        return FailedJob(job, "unreadable", f"{RESULT_FILE}: 'comparison' must be a list of rows")
    status = str(result.get("status", "unknown"))
    if status != "finished":
        return FailedJob(job, status, str(result.get("reason") or result.get("error") or "no reason recorded"))
    try:
        rows = [
            ComparisonRow.from_json(value, f"{RESULT_FILE}, comparison[{number}]")
            for number, value in enumerate(result.get("comparison", []))
        ]
    except UserError as error:
        return FailedJob(job, "unreadable", str(error))
    return [_with_report(row, result.get("report")) for row in rows]


def _with_report(row: ComparisonRow, report: object) -> ComparisonRow:
    """A run of stage 1 keeps its report beside its rows; it belongs to the target."""
    if row.kind != "target" or row.alignment or not isinstance(report, Mapping) or not report.get("alignment"):
        return row
    return replace(row, alignment=_plain(report))
