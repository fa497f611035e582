"""Which models of some runs are evaluated: all, or some by kind and by name, and the best one of each seed."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fusion.config import UserError, raise_problems
from fusion.tracking.rows import AVERAGE, ComparisonRow
from fusion.tracking.summary import Comparison

SHOWN = 12
"""Names of models that a message lists."""


@dataclass(frozen=True)
class Line:
    """A model of the runs, over its seeds."""

    name: str
    kind: str
    rows: tuple[ComparisonRow, ...]


@dataclass(frozen=True)
class Best:
    """A line that is made of one model for each seed."""

    kind: str
    lost: Callable[[ComparisonRow], float | None]
    """The model with the lowest value is the seed's best one; None: it cannot be chosen."""
    remedy: str


def _failed(row: ComparisonRow) -> float | None:
    score = row.scores.get(AVERAGE)
    return None if score is None else -score


BEST: Mapping[str, Best] = {
    "best_target": Best("target", lambda row: row.nll_per_byte, "give runs with held-out dialogues"),
    "best_target_of_test": Best("target", _failed, "give runs with test dialogues"),
    "best_found": Best(
        "merged", lambda row: row.search_value, "give merges of a search, hparams_search=merge_weights"
    ),
}


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
    known = list(dict.fromkeys([*BEST, *(line.kind for line in found), *(line.name for line in found)]))
    raise_problems([_unknown(name, known) for name, some in named.items() if not some])
    return list({line.name: line for some in named.values() for line in some}.values())


def _unknown(name: str, known: Sequence[str]) -> str:
    """A search has hundreds of models: those with near names come first, and some of the others."""
    shown = list(dict.fromkeys([*difflib.get_close_matches(name, known, SHOWN // 2), *known]))[:SHOWN]
    rest = f" and {len(known) - len(shown)} more" if len(known) > len(shown) else ""
    return f"only: no model of these runs is '{name}'; there are {', '.join(shown)}{rest}"


def _named(found: Sequence[Line], name: str) -> list[Line]:
    if name in BEST:
        return _best(found, name)
    return [line for line in found if name in (line.kind, line.name)]


def _best(found: Sequence[Line], name: str) -> list[Line]:
    """The best model of every seed as one line; of equal ones the first by name. None where there is none of its kind.

    Raises:
        UserError: no model has the value that decides.
    """
    best = BEST[name]
    rows = sorted((row for line in found if line.kind == best.kind for row in line.rows), key=lambda row: row.model)
    measured = [(row.seed, value, row) for row in rows if (value := best.lost(row)) is not None]
    if rows and not measured:
        raise UserError(f"only: {name} is chosen by a value that none of these models has; {best.remedy}")
    chosen: dict[int | None, tuple[float, ComparisonRow]] = {}
    for seed, value, row in measured:
        if seed not in chosen or value < chosen[seed][0]:
            chosen[seed] = value, row
    kept = tuple(row for _, (_, row) in sorted(chosen.items(), key=lambda pair: (pair[0] is None, pair[0] or 0)))
    return [Line(name.replace("_", " "), best.kind, kept)] if kept else []


def unique_names(names: Sequence[str]) -> list[str]:
    """A number is added where two are called alike."""
    return [
        f"{name}_{names[: place + 1].count(name)}" if list(names).count(name) > 1 else name
        for place, name in enumerate(names)
    ]
