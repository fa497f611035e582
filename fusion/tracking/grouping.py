"""From rows to a comparison: seeds joined, models named and ordered, the best merge called best or tied."""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fusion.tracking.rows import AVERAGE, KINDS, ComparisonRow, Kind
from fusion.tracking.statistics import Estimate, Interval, average_interval, estimate, overlap, wilson_interval
from fusion.tracking.summary import Comparison, ModelSummary, Verdict, rank, setting_name


def summarise(rows: Iterable[ComparisonRow]) -> Comparison:
    """Join the seeds of each model and put the models in the order of the report, whatever the order of `rows`.

    Raises `UserError` with every problem of a row that breaks the contract.
    """
    rows = [ComparisonRow.from_json(row.to_json(), f"row of {row.kind} {row.model}") for row in rows]
    rows.sort(key=lambda row: (*map(str, row.identity), _canonical(row.to_json())))
    skills = _skills(rows)
    groups: dict[str, list[ComparisonRow]] = defaultdict(list)
    for row in rows:
        groups[_canonical([row.kind, _name(row), _settings(row)])].append(row)
    labels = _labels([group[0] for group in groups.values()])
    models = [_summary(label, group, skills) for label, group in zip(labels, groups.values(), strict=True)]
    models.sort(
        key=lambda model: (KINDS.index(model.kind), *(rank(model) if model.kind == "merged" else (model.label,)))
    )
    return Comparison(skills, tuple(_with_verdicts(models)))


def _skills(rows: Sequence[ComparisonRow]) -> tuple[str, ...]:
    """Skills next to their neighbours: in the order in which the sources are strong in them, then by name."""
    strong = [skill for row in rows if row.kind == "source" for skill in row.strong_skills]
    scored = {skill for row in rows for skill in row.scores if skill != AVERAGE}
    return tuple(dict.fromkeys([skill for skill in strong if skill in scored] + sorted(scored)))


def _name(row: ComparisonRow) -> str:
    return row.strategy or row.model


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _flat(parameters: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in sorted(parameters.items()):
        nested = isinstance(value, Mapping) and value
        flat |= _flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def _settings(row: ComparisonRow) -> dict[str, Any]:
    """All that makes a row another model than one with the same name, except the seed."""
    settings = {key: value for key, value in _flat(row.parameters).items() if key.rpartition(".")[2] != "seed"}
    if row.kind == "merged":
        settings |= {"model": row.model, "scale": "search" if row.scale_searched else row.scale}
    return settings


def _labels(firsts: Sequence[ComparisonRow]) -> list[str]:
    """Names, with as few settings as tell apart several models of one name."""
    settings = [_settings(row) for row in firsts]
    names = [(row.kind, _name(row)) for row in firsts]
    groups: dict[tuple[Kind, str], list[dict[str, Any]]] = defaultdict(list)
    for name, own in zip(names, settings, strict=True):
        groups[name].append(own)
    telling = {name: _telling_keys(group) for name, group in groups.items()}
    return [
        " ".join([name[1], *(f"{setting_name(key)}={_short(own[key])}" for key in telling[name] if key in own)])
        for name, own in zip(names, settings, strict=True)
    ]


def _telling_keys(group: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys whose values tell the members apart; one that follows from those before it tells nothing. Names first."""
    keys = sorted({key for own in group for key in own}, key=lambda key: (not key.endswith("name"), key))
    chosen: list[str] = []
    for key in keys:
        if _num_kinds(group, [*chosen, key]) > _num_kinds(group, chosen):
            chosen.append(key)
    return chosen


def _num_kinds(group: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> int:
    return len({_canonical([own.get(key) for key in keys]) for own in group})


def _short(value: object) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_short, value))}]"
    return f"{value:.4g}" if isinstance(value, float) else str(value) or "''"


def _summary(label: str, group: Sequence[ComparisonRow], skills: Sequence[str]) -> ModelSummary:
    rows = sorted(group, key=lambda row: (row.seed is None, row.seed or 0, row.path))
    measured = _distinct(rows)
    scores = {skill: _score(measured, skill) for skill in (*skills, AVERAGE)}
    nll_per_byte = estimate([row.nll_per_byte for row in measured])
    settings = {key: value for key, value in _settings(rows[0]).items() if key != "model"}
    return ModelSummary(label, rows[0].kind, tuple(rows), settings, scores, nll_per_byte, reports=_reports(rows))


def _distinct(rows: Iterable[ComparisonRow]) -> list[ComparisonRow]:
    """A folder that jobs of several seeds scored with the same outcome is one measurement, not one per seed."""
    measured: dict[tuple[object, str], ComparisonRow] = {}
    for row in rows:
        measured.setdefault((row.path or row.seed, _canonical(row.to_json()["scores"])), row)
    return list(measured.values())


def _reports(rows: Iterable[ComparisonRow]) -> tuple[Mapping[str, Any], ...]:
    """Each folder's report once, however many jobs have scored it."""
    return tuple({row.path or row.seed: row.alignment for row in rows if row.alignment}.values())


def _score(rows: Sequence[ComparisonRow], skill: str) -> Estimate:
    values = [row.scores.get(skill) for row in rows]
    items: Interval | None = None
    scored = next((row for row, value in zip(rows, values, strict=True) if value is not None), None)
    if scored and skill == AVERAGE:
        shares = {name: x for name, x in scored.scores.items() if name != AVERAGE and x is not None}
        items = average_interval(shares, scored.num_items)
    elif scored and scored.num_items.get(skill, 0) > 0:
        items = wilson_interval(scored.scores[skill] or 0.0, scored.num_items[skill])
    return estimate(values, items, share=True)


def _with_verdicts(models: Sequence[ModelSummary]) -> list[ModelSummary]:
    """Call the leading merge best if no other merge reaches its interval; else it and those that do are tied."""
    merged = [model for model in models if model.kind == "merged" and model.average.mean is not None]
    if len(merged) < 2:
        return list(models)
    tied = [model for model in merged[1:] if overlap(merged[0].average, model.average)]
    verdicts: dict[int, Verdict] = {id(model): "tied" for model in tied}
    verdicts[id(merged[0])] = "tied" if tied else "best"
    return [replace(model, verdict=verdicts.get(id(model), "")) for model in models]
