"""What a scorer returns: one score per item, and what is needed to read them."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from fusion.evaluation.candidate import Candidate
from fusion.evaluation.statistics import Result, Sample, measure, sample

AVERAGE = "average"


@dataclass(frozen=True)
class ScoredItem:
    """One answer of one model."""

    item: str
    """Names the question: a content hash, or the benchmark's own id."""
    category: str
    seed: int
    """Repetition: the seed of whatever was drawn."""
    score: float | None
    """None: there is no score (a verdict that cannot be read, say); the item is left out and counted."""
    weight: float = 1.0
    """What the item counts within its category."""


@dataclass(frozen=True)
class ScoreSheet:
    """All items that one scorer has scored of one model."""

    scorer: str
    model: str
    items: tuple[ScoredItem, ...]
    unit: str = ""
    """What the numbers are, for tables."""
    factor: float = 1.0
    """Tables show the score times this (100 for shares in percent)."""
    more_is_better: bool = True
    by_category: bool = False
    """The average weighs every category alike; otherwise every item."""
    notes: tuple[str, ...] = ()
    """Sentences that belong under every table of these scores."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What the scores were made with: judge, prompts, versions, costs."""
    records: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    """Lines to keep beside the scores, by the name of their file: answers, judgments."""

    @property
    def scored(self) -> tuple[ScoredItem, ...]:
        return tuple(one for one in self.items if one.score is not None)

    @property
    def excluded(self) -> int:
        return len(self.items) - len(self.scored)

    @property
    def categories(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(one.category for one in self.items))

    def result(self, category: str = AVERAGE) -> Result | None:
        """Score of one category, or of all, with its interval; None with fewer than two scored items per seed."""
        chosen = {(one.seed, one.item): one for one in self.scored if category in (AVERAGE, one.category)}
        return _measured({key: one.score or 0.0 for key, one in chosen.items()}, chosen, self._averages(category))

    def _averages(self, category: str) -> bool:
        return self.by_category and category == AVERAGE

    def to_json(self) -> dict[str, Any]:
        """The sheet without items and records, and a summary of them."""
        results = {name: self.result(name) for name in (AVERAGE, *self.categories)}
        return {
            **{name: value for name, value in asdict(self).items() if name not in ("items", "records")},
            "scores": {name: asdict(one) if one else None for name, one in results.items()},
            "scored": len(self.scored),
            "excluded": self.excluded,
        }


class Scorer(Protocol):
    """Anything that can score a model."""

    @property
    def name(self) -> str: ...

    def score(self, candidate: Candidate) -> ScoreSheet: ...


def difference(first: ScoreSheet, second: ScoreSheet, category: str = AVERAGE) -> Result | None:
    """How much more `first` scores than `second` on the items that both have a score of, seed by seed.

    None where fewer than two items per seed are common.
    """
    chosen = {(one.seed, one.item): one for one in first.scored if category in (AVERAGE, one.category)}
    others = {(one.seed, one.item): one.score for one in second.scored}
    gaps = {key: (one.score or 0.0) - (others[key] or 0.0) for key, one in chosen.items() if key in others}
    return _measured(gaps, chosen, first._averages(category))


def _measured(
    values: Mapping[tuple[int, str], float], items: Mapping[tuple[int, str], ScoredItem], by_category: bool
) -> Result | None:
    drawn = _sample(values, items, by_category)
    return measure(drawn) if drawn else None


def _sample(
    values: Mapping[tuple[int, str], float], items: Mapping[tuple[int, str], ScoredItem], by_category: bool
) -> Sample | None:
    """Values by seed and item. Seeds that ask the same items are crossed; if each asks its own, items are nested.

    Where an item has no value under one seed only, it is left out of all, so that seeds stay comparable.
    """
    seeds = sorted({seed for seed, _ in values})
    asked = {seed: sorted(item for own, item in items if own == seed) for seed in seeds}
    crossed = len({tuple(one) for one in asked.values()}) <= 1
    common = Counter(item for _, item in values)
    kept = {
        seed: [item for item in asked[seed] if (seed, item) in values and (not crossed or common[item] == len(seeds))]
        for seed in seeds
    }
    if not seeds or any(len(one) < 2 for one in kept.values()):
        return None
    codes = {name: code for code, name in enumerate(sorted({one.category for one in items.values()}))}
    rows = [[(values[seed, item], items[seed, item]) for item in kept[seed]] for seed in seeds]
    return sample(
        [[value for value, _ in row] for row in rows],
        [[codes[one.category] for _, one in row] for row in rows] if by_category else None,
        [[one.weight for _, one in row] for row in rows],
        crossed=crossed,
    )


def merged_sheets(sheets: Sequence[ScoreSheet]) -> ScoreSheet:
    """Sheets of repetitions of one model (other seeds) as one sheet.

    Raises ValueError where they are of several scorers or name a seed twice.
    """
    items = tuple(one for sheet in sheets for one in sheet.items)
    if len({(one.seed, one.item) for one in items}) < len(items) or len({sheet.scorer for sheet in sheets}) > 1:
        raise ValueError("repetitions have one scorer and a seed each")
    first = sheets[0]
    records = {name: [line for sheet in sheets for line in sheet.records.get(name, ())] for name in first.records}
    notes = tuple(dict.fromkeys(note for sheet in sheets for note in sheet.notes))
    return ScoreSheet(**{**vars(first), "items": items, "notes": notes, "records": records})


def item_rows(sheets: Iterable[ScoreSheet]) -> list[dict[str, Any]]:
    """A line per scored item, for a JSONL file."""
    return [{"scorer": sheet.scorer, "model": sheet.model, **asdict(one)} for sheet in sheets for one in sheet.items]
