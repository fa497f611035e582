"""The numbers that the drawings of a comparison page show, as plain JSON; what is too much is thinned, and said."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from markupsafe import Markup

from fusion.tracking.ancestry import Ancestry, Piece
from fusion.tracking.hyperparameters import HyperParameter
from fusion.tracking.rows import AVERAGE, ComparisonRow
from fusion.tracking.summary import Comparison, ModelSummary
from fusion.tracking.traces import Traces

MOST_CURVES, CURVE_POINTS = 40, 6000
"""Trainings that are drawn, and points of all of them together."""
MOST_MERGES = 60
"""Merges whose coefficients and lineage can be chosen."""
FEWEST_POINTS, MOST_POINTS = 40, 300


def drawings(comparison: Comparison, settings: Sequence[HyperParameter], traces: Traces) -> dict[str, Any]:
    """What `drawings/*.js` read, by drawing."""
    return {
        "skills": list(comparison.skills),
        "average": AVERAGE,
        "models": [_model(model) for model in comparison.models],
        "contest": [comparison.models.index(model) for model in comparison.contest],
        "settings": [setting._asdict() for setting in settings],
        "curves": _curves(comparison, traces),
        "heats": _heats(comparison, traces),
        "lineage": _lineage(comparison, traces),
        "answers": [
            {"job": one.job, "asked": one.num_questions, "questions": [asdict(x) for x in one.questions]}
            for one in traces.evaluations
            if one.questions
        ],
    }


def script_names(drawn: Mapping[str, Any]) -> list[str]:
    """The drawings that have something to show, in the order of the page; the table's script is always among them."""
    contest = [drawn["settings"][n]["values"][m] for n in range(len(drawn["settings"])) for m in drawn["contest"]]
    has = {
        "table": True,
        "parallel": len(drawn["contest"]) > 1 and any(value is not None for value in contest),
        "radar": len(drawn["skills"]) > 2,
        "heat": drawn["heats"]["merges"],
        "curves": drawn["curves"]["lines"],
        "lineage": drawn["lineage"]["runs"],
        "answers": drawn["answers"],
    }
    return [name for name, is_there in has.items() if is_there]


def script_json(data: Mapping[str, Any]) -> Markup:
    """JSON for a script element: no `<` is in it that could end the element."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), default=str)
    return Markup(text.replace("<", "\\u003c"))


def _model(model: ModelSummary) -> dict[str, Any]:
    scores = {
        skill: None if score.mean is None else [_short(x) for x in (score.mean, *(score.interval or ()))]
        for skill, score in model.scores.items()
    }
    return {"label": model.label, "kind": model.kind, "scores": scores}


def _runs(comparison: Comparison) -> Iterator[tuple[int, ModelSummary, ComparisonRow]]:
    """Every run with the place of its model: the leading models of the contest first, one seed after the other."""
    leading = comparison.contest + [model for model in comparison.models if model not in comparison.contest]
    places = {id(model): place for place, model in enumerate(comparison.models)}
    for model in leading:
        for row in {row.path: row for row in model.rows}.values():
            yield places[id(model)], model, row


def _name(model: ModelSummary, row: ComparisonRow) -> str:
    return model.label if len(model.rows) == 1 or row.seed is None else f"{model.label}, seed {row.seed}"


def _curves(comparison: Comparison, traces: Traces) -> dict[str, Any]:
    found = [
        (place, _name(model, row), row.path) for place, model, row in _runs(comparison) if row.path in traces.curves
    ]
    shown = found[:MOST_CURVES]
    points = min(MOST_POINTS, max(FEWEST_POINTS, CURVE_POINTS // max(1, len(shown))))
    lines = [
        {"model": place, "name": name, **traces.curves[path].thinned(points).to_json()} for place, name, path in shown
    ]
    is_thinned = any(len(traces.curves[path].steps) > points for _, _, path in shown)
    return {"lines": lines, "all": len(found), "thinned": is_thinned}


def _heats(comparison: Comparison, traces: Traces) -> dict[str, Any]:
    found = [
        (place, _name(model, row), traces.coefficients[row.path])
        for place, model, row in _runs(comparison)
        if row.path in traces.coefficients
    ]
    merges = [
        {
            "model": place,
            "name": name,
            "targets": heat.targets,
            "layers": heat.layers,
            "values": [[_short(value) for value in row] for row in heat.values],
        }
        for place, name, heat in found[:MOST_MERGES]
    ]
    return {"merges": merges, "all": len(found)}


def _lineage(comparison: Comparison, traces: Traces) -> dict[str, Any]:
    """Pieces are numbered over all runs, so that what two runs share is there once."""
    kinds = {"merged"} if comparison.of_kind("merged") else {"target", "sft"}
    found = [
        (place, _name(model, row), traces.ancestries[row.path])
        for place, model, row in _runs(comparison)
        if model.kind in kinds and row.path in traces.ancestries and traces.ancestries[row.path].edges
    ]
    runs = found[:MOST_MERGES]
    pieces: dict[Piece, int] = {}
    for _, _, line in runs:
        for piece in line.pieces:
            pieces.setdefault(piece, len(pieces))
    return {
        "pieces": [piece._asdict() for piece in pieces],
        "runs": [{"model": place, "name": name, "edges": _edges(line, pieces)} for place, name, line in runs],
        "all": len(found),
    }


def _edges(line: Ancestry, pieces: dict[Piece, int]) -> list[list[int]]:
    return [[pieces[first], pieces[second]] for first, second in line.edges]


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
