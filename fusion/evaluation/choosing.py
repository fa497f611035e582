"""Which models of some runs are evaluated: all, or some by kind and by name, and the best target of each seed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fusion.config import UserError, raise_problems
from fusion.tracking.rows import AVERAGE, ComparisonRow
from fusion.tracking.summary import Comparison


@dataclass(frozen=True)
class Line:
    """A model of the runs, over its seeds."""

    name: str
    kind: str
    rows: tuple[ComparisonRow, ...]


def _heldout(row: ComparisonRow) -> float | None:
    return row.nll_per_byte


def _tested(row: ComparisonRow) -> float | None:
    score = row.scores.get(AVERAGE)
    return None if score is None else -score


BEST: Mapping[str, Callable[[ComparisonRow], float | None]] = {
    "best_target": _heldout,
    "best_target_of_test": _tested,
}
"""What decides which target of a seed is its best one; the lowest value wins."""


def lines(comparison: Comparison) -> list[Line]:
    """Every model of a comparison, under a name of its own."""
    labels = [f"{one.kind} {one.label}" if one.kind != one.label else one.label for one in comparison.models]
    return [
        Line(label, one.kind, one.rows) for label, one in zip(unique_names(labels), comparison.models, strict=True)
    ]


def choose(found: Sequence[Line], only: Sequence[str]) -> list[Line]:
    """The lines that `only` names, in its order, each once; all where it names none.

    Raises:
        UserError: no model has one of the names.
    """
    if not only:
        return list(found)
    named = {name: _named(found, name) for name in only}
    known = ", ".join([*dict.fromkeys(line.kind for line in found), *(line.name for line in found), *BEST])
    raise_problems(
        [f"only: no model of these runs is '{name}'; there are {known}" for name, some in named.items() if not some]
    )
    return list({line.name: line for some in named.values() for line in some}.values())


def _named(found: Sequence[Line], name: str) -> list[Line]:
    if name in BEST:
        return _best(found, name)
    return [line for line in found if name in (line.kind, line.name)]


def _best(found: Sequence[Line], name: str) -> list[Line]:
    """The best target of every seed as one line; of equal ones the first by name. None where there is no target."""
    rows = sorted((row for line in found if line.kind == "target" for row in line.rows), key=lambda row: row.model)
    measured = [(row.seed, value, row) for row in rows if (value := BEST[name](row)) is not None]
    if rows and not measured:
        raise UserError(f"only: {name} needs targets with a score; run train.py with evaluation=skills")
    best: dict[int | None, tuple[float, ComparisonRow]] = {}
    for seed, value, row in measured:
        if seed not in best or value < best[seed][0]:
            best[seed] = value, row
    return [Line(name.replace("_", " "), "target", tuple(row for _, row in best.values()))] if best else []


def unique_names(names: Sequence[str]) -> list[str]:
    """A number is added where two are called alike."""
    return [
        f"{name}_{names[: place + 1].count(name)}" if list(names).count(name) > 1 else name
        for place, name in enumerate(names)
    ]
