"""What stage 1 reports of alignment and fusion: read from results of any age, and averaged over seeds.

Everything that is counted is one of the pivot's supervised tokens; numbers that a report lacks are None. Shares are
fractions of 1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from itertools import accumulate
from statistics import fmean
from typing import Any

from fusion.tracking.summary import Comparison, ModelSummary, count_text, percent

# As in `fusion.alignment.relations` and `fusion.alignment.categories`, which would load numerical libraries.
RELATIONS = ("1-1", "1-n", "n-1", "inner", "unread", "unproven")
CATEGORIES = ("letters", "digits", "white space", "CJK", "code", "markup", "punctuation", "other")
DTW = ("another_row", "no_row", "unread_row")
"""How the authors' path differs from exact byte spans: see `fusion.alignment.disagreement`."""
STORES = ("teacher", "aligned")


@dataclass(frozen=True)
class Segment:
    """A piece of a bar from 0 to 1: tokens of one relation that are covered, or are not."""

    relation: str
    start: float
    width: float
    is_covered: bool


@dataclass(frozen=True)
class Part:
    """Some of the tokens that a source was aligned to."""

    share: float | None
    """Of all tokens."""
    covered: float | None
    """Share of these tokens to which the source says something; the others fall back."""
    mass_kept: float | None
    """Of the source's probability, what pivot tokens got; mean over these tokens, where the source stands beside."""


@dataclass(frozen=True)
class Category(Part):
    """The tokens that spell text of one category."""

    kinds: Mapping[str, float]
    """Shares of these tokens by relation."""

    @property
    def segments(self) -> list[Segment]:
        """The kinds side by side; which of them are covered is not told."""
        return _segments([(relation, share, True) for relation, share in self.kinds.items()])


@dataclass(frozen=True)
class AlignmentReport:
    """One source on the pivot's tokens."""

    tokens: float | None
    covered: float | None
    mass_kept: float | None
    kinds: Mapping[str, Part]
    categories: Mapping[str, Category]
    dtw: Mapping[str, float | None]
    bytes_per_row: Mapping[str, float | None]

    @property
    def segments(self) -> list[Segment]:
        """The kinds side by side, each with its covered tokens first."""
        pieces = []
        for relation, part in self.kinds.items():
            covered = (part.share or 0.0) * (part.covered or 0.0)
            pieces += [(relation, covered, True), (relation, (part.share or 0.0) - covered, False)]
        return _segments(pieces)


@dataclass(frozen=True)
class FusionReport:
    """What became of the tokens of all training dialogues."""

    tokens: float | None
    fallback: float | None
    """Share of the tokens for which no model chosen by the fusion function has anything to say."""
    dialogues: float | None
    trained_on: float | None
    """Dialogues."""
    who_won: Mapping[str, float]
    """Dialogues by model."""
    rows_won: Mapping[str, float]
    """Share of tokens by model."""

    @property
    def winners(self) -> list[str]:
        """Every model with its dialogues and its share of tokens, such as "pivot 158 (56.4%)"."""
        return [
            f"{model} {count_text(self.who_won.get(model, 0.0))}"
            + (f" ({percent(self.rows_won[model])}%)" if model in self.rows_won else "")
            for model in dict.fromkeys((*self.who_won, *self.rows_won))
        ]


@dataclass(frozen=True)
class Line:
    """One source of one target, over the seeds of the target."""

    place: int
    """Of the target among the models of the comparison, from 1."""
    label: str
    target: str
    source: str
    strategy: str
    seeds: int
    alignment: AlignmentReport
    fusion: FusionReport


def comparison_lines(comparison: Comparison) -> list[Line]:
    """Lines of all models with a report, in the order of the comparison."""
    return [line for place, model in enumerate(comparison.models, 1) for line in model_lines(model, place)]


def model_lines(model: ModelSummary, place: int = 1) -> list[Line]:
    """One line per source; none for models without a report."""
    sources = dict.fromkeys(source for report in model.reports for source in _object(report, "alignment"))
    strategy = str(model.settings.get("alignment.name") or "-")
    return [_line(place, model, source, strategy) for source in sources]


def _line(place: int, model: ModelSummary, source: str, strategy: str) -> Line:
    reports = [report for report in model.reports if source in _object(report, "alignment")]
    alignment = mean([read_alignment(_object(report["alignment"], source)) for report in reports])
    fusion = mean([read_fusion(report) for report in reports])
    return Line(place, model.label, model.rows[0].model, source, strategy, len(reports), alignment, fusion)


def read_alignment(report: Mapping[str, Any]) -> AlignmentReport:
    """The report of one source, as `fusion.alignment.pair.AlignedStore.report` gives it."""
    kinds, categories = _object(report, "kinds"), _object(report, "categories")
    return AlignmentReport(
        _number(report, "supervised_rows"),
        _number(report, "covered"),
        _number(report, "mass_kept"),
        {name: Part(*_part(_object(kinds, name))) for name in RELATIONS if kinds},
        {name: _category(_object(categories, name)) for name in CATEGORIES if categories},
        {name: _number(_object(report, "dtw"), name) for name in DTW},
        {name: _number(_object(report, "bytes_per_row"), name) for name in STORES},
    )


def read_fusion(report: Mapping[str, Any]) -> FusionReport:
    """The report of one run, as `fusion.training.prepare.Prepared.report` gives it."""
    won = _numbers(report, "who_won")
    return FusionReport(
        _number(report, "supervised_rows"),
        _number(report, "fallback_share"),
        sum(won.values()) if won else None,
        _number(report, "trained_on"),
        won,
        _numbers(report, "rows_won"),
    )


def mean(values: Sequence[Any]) -> Any:
    """Of numbers, or of reports of one type, field by field and key by key.

    What is not known counts nowhere; a key that only some mappings have counts as 0 in the others.
    """
    known = [value for value in values if value is not None and value != {}]
    if not known:
        return values[0]
    first = known[0]
    if is_dataclass(first):
        kind: Any = type(first)
        return kind(*(mean([getattr(value, item.name) for value in known]) for item in fields(first)))
    if isinstance(first, Mapping):
        keys = dict.fromkeys(key for value in known for key in value)
        return {key: mean([value.get(key, 0.0) for value in known]) for key in keys}
    return fmean(known)


def occurring_kinds(reports: Sequence[AlignmentReport]) -> list[str]:
    """Relations that some token has."""
    return [name for name in RELATIONS if any(name in one.kinds and one.kinds[name].share for one in reports)]


def occurring_categories(reports: Sequence[AlignmentReport]) -> list[str]:
    """Categories of which there is some token."""
    return [
        name for name in CATEGORIES if any(name in one.categories and one.categories[name].share for one in reports)
    ]


def _segments(pieces: Sequence[tuple[str, float, bool]]) -> list[Segment]:
    ends = accumulate(width for _, width, _ in pieces)
    return [
        Segment(name, end - width, width, covered)
        for (name, width, covered), end in zip(pieces, ends, strict=True)
        if width > 0
    ]


def _category(part: Mapping[str, Any]) -> Category:
    counts = _numbers(part, "kinds")
    total = sum(counts.values()) or 1.0
    return Category(*_part(part), {name: counts.get(name, 0.0) / total for name in RELATIONS})


def _part(part: Mapping[str, Any]) -> tuple[float | None, float | None, float | None]:
    """Share, covered and mass kept; a part that a report does not name has no tokens."""
    return (_number(part, "share") if part else 0.0), _number(part, "covered"), _number(part, "mass_kept")


def _object(value: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = value.get(key)
    return found if isinstance(found, Mapping) else {}


def _numbers(value: Mapping[str, Any], key: str) -> dict[str, float]:
    found = {name: _number(_object(value, key), name) for name in sorted(_object(value, key))}
    return {name: number for name, number in found.items() if number is not None}


def _number(value: Mapping[str, Any], key: str) -> float | None:
    found = value.get(key)
    return float(found) if isinstance(found, int | float) and not isinstance(found, bool) else None
