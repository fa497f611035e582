"""Tables of scores in which only differences are marked that stand out from noise."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations, pairwise
from typing import Any

from fusion.evaluation.sheet import AVERAGE, ScoreSheet, difference
from fusion.evaluation.statistics import LEVEL, Result, holm

BETTER, WORSE, MISSING = "▲", "▼", "-"
PAIRS: Mapping[str, Callable[[Sequence[ScoreSheet]], Iterable[tuple[ScoreSheet, ScoreSheet]]]] = {
    "all": lambda sheets: combinations(sheets, 2),
    "first": lambda sheets: ((sheets[0], other) for other in sheets[1:]),
    "next": pairwise,
}
"""Which models are compared, the earlier one first. Fewer comparisons, named beforehand, are corrected less."""


@dataclass(frozen=True)
class Contrast:
    """The first model's score less the second's."""

    scorer: str
    category: str
    first: str
    second: str
    result: Result
    adjusted: float
    """p-value after Holm's correction over all contrasts of its table."""
    more_is_better: bool

    @property
    def is_significant(self) -> bool:
        return self.adjusted < LEVEL

    @property
    def mark(self) -> str:
        """Whether the first model is better or worse; empty for what may be noise."""
        if not self.is_significant:
            return ""
        return BETTER if (self.result.mean > 0) == self.more_is_better else WORSE

    def to_json(self) -> dict[str, Any]:
        result = {key: value for key, value in asdict(self.result).items() if key != "freedom"}
        detectable = self.result.detectable
        return {**asdict(self), "result": result, "significant": self.is_significant, "detectable": detectable}


def against(reference: ScoreSheet, others: Sequence[ScoreSheet]) -> list[Contrast]:
    """Every other model less the reference, on average and by category; corrected over all of them together."""
    names = (AVERAGE, *reference.categories) if len(reference.categories) > 1 else (AVERAGE,)
    return _corrected(_contrast(sheet, reference, name) for sheet in others for name in names)


def contrasts(sheets: Sequence[ScoreSheet], pairs: str = "all") -> list[Contrast]:
    """The models of every pair (`PAIRS`) on average, the later less the earlier; corrected over these pairs."""
    return _corrected(_contrast(second, first, AVERAGE) for first, second in PAIRS[pairs](sheets))


def _contrast(first: ScoreSheet, second: ScoreSheet, category: str) -> Contrast | None:
    result = difference(first, second, category)
    if result is None:
        return None
    return Contrast(first.scorer, category, first.model, second.model, result, result.p_value, first.more_is_better)


def _corrected(contrasts: Iterable[Contrast | None]) -> list[Contrast]:
    found = [one for one in contrasts if one is not None]
    adjusted = holm([one.result.p_value for one in found])
    return [replace(one, adjusted=p) for one, p in zip(found, adjusted, strict=True)]


def markdown(sheets: Sequence[ScoreSheet], pairs: Sequence[Contrast]) -> str:
    """Scores of one scorer and its `contrasts` as Markdown; the first sheet is the reference of the marks."""
    reference, *others = sheets
    marks = {(one.first, one.category): one.mark for one in against(reference, others)}
    parts = [f"## {reference.scorer}", _scores_table(sheets, marks)]
    if pairs:
        parts += [_pairs_table(pairs, reference.factor), _reading(reference, pairs)]
    notes = dict.fromkeys(note for sheet in sheets for note in (*sheet.notes, *_excluded(sheet)))
    parts += ["\n".join(f"- {note}" for note in notes)] if notes else []
    return "\n\n".join(parts) + "\n"


def _scores_table(sheets: Sequence[ScoreSheet], marks: Mapping[tuple[str, str], str]) -> str:
    categories = tuple(dict.fromkeys(name for sheet in sheets for name in sheet.categories))
    names = (*(categories if len(categories) > 1 else ()), AVERAGE)
    head = ["model", *names[:-1], f"{AVERAGE} ({sheets[0].unit})" if sheets[0].unit else AVERAGE, "items", "seeds"]
    rows = []
    for sheet in sheets:
        cells = [_score_text(sheet, name) + marks.get((sheet.model, name), "") for name in names]
        seeds = len({one.seed for one in sheet.items})
        rows.append([sheet.model, *cells, str(len(sheet.scored)), str(seeds)])
    return table(head, rows)


def _score_text(sheet: ScoreSheet, category: str) -> str:
    result = sheet.result(category)
    if result is None:
        return MISSING
    mean, low, high = (number(sheet.factor * value) for value in (result.mean, *result.interval))
    return f"{mean} [{low}, {high}]" if category == AVERAGE else mean


def _pairs_table(pairs: Sequence[Contrast], factor: float) -> str:
    rows = []
    for one in pairs:
        mean, low, high = (number(factor * value, "+") for value in (one.result.mean, *one.result.interval))
        p_value, adjusted = (p_text(value) for value in (one.result.p_value, one.adjusted))
        smallest = number(factor * one.result.detectable)
        name = f"{one.first} against {one.second}"
        rows.append([name, f"{mean} [{low}, {high}]", p_value, adjusted, one.mark or "not shown", smallest])
    return table(["pair", "difference [95%]", "p", "p (Holm)", "difference is", "detectable"], rows)


def _reading(reference: ScoreSheet, pairs: Sequence[Contrast]) -> str:
    over = "seeds and items" if pairs[0].result.num_seeds > 1 else "items"
    return (
        f"{BETTER} better, {WORSE} worse: significant at 5% by a paired test over {over} after Holm's correction over "
        f"the table (in the first table: against {reference.model}). All else may be noise. Detectable: the smallest "
        "true difference that this many items would show in 80% of all repetitions."
    )


def _excluded(sheet: ScoreSheet) -> Iterator[str]:
    if sheet.excluded:
        yield f"{sheet.model}: {sheet.excluded} of {len(sheet.items)} items have no score and are left out."


def number(value: float, sign: str = "") -> str:
    """Two decimals, or four for numbers below 1 in size."""
    return f"{value:{sign}.2f}" if abs(value) >= 1 or abs(value) < 1e-9 else f"{value:{sign}.4f}"


def p_text(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    cells = [[text.replace("|", "\\|") for text in row] for row in (head, *rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (cells[0], rule, *cells[1:]))
