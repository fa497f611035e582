"""What jobs left beside the scores of their models: losses, coefficients by layer, lineage, evaluations."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusion.tracking.ancestry import Ancestry, ancestry
from fusion.tracking.curves import Curve, read_curve
from fusion.tracking.evaluations import Evaluation, read_evaluation, sampled_answers
from fusion.tracking.merge_page import MergeView
from fusion.tracking.record import LINEAGE, RESULT, read_result
from fusion.tracking.rows import ComparisonRow, result_files

MADE_HERE = ("target", "sft", "merged")


@dataclass(frozen=True)
class LayerCoefficients:
    """Mean coefficient of every target, by layer; a tensor outside every numbered layer is its own."""

    targets: tuple[str, ...]
    layers: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]  # a row per layer, a number per target


@dataclass(frozen=True)
class Traces:
    """By the path of the scored model, as its row names it."""

    curves: Mapping[str, Curve] = field(default_factory=dict)
    coefficients: Mapping[str, LayerCoefficients] = field(default_factory=dict)
    ancestries: Mapping[str, Ancestry] = field(default_factory=dict)
    evaluations: Sequence[Evaluation] = ()


NO_TRACES = Traces()


def read_traces(folders: Sequence[Path], rows: Sequence[ComparisonRow]) -> Traces:
    """Of the models in `rows` that a job made, wherever their folders are, and of the evaluations below `folders`.

    A folder that was moved is found below `folders` by the path that its record names.
    """
    results = {name: (file.parent, read_result(file.parent)) for name, file in result_files(folders).items()}
    moved = {path: folder for folder, result in results.values() for path in _own_paths(result)}
    curves, coefficients, ancestries = {}, {}, {}
    for row in rows:
        folder = moved.get(row.path, Path(row.path).parent)
        if row.kind not in MADE_HERE or not row.path or not (folder / RESULT).is_file():
            continue
        result = read_result(folder)
        ancestries[row.path] = ancestry(
            str(result.get("stage")), row.strategy or row.model, row.path, _lineage(folder)
        )
        if row.kind == "merged" and (found := _coefficients(result)):
            coefficients[row.path] = found
        elif row.kind != "merged" and (curve := read_curve(folder)):
            curves[row.path] = curve
    sampled = sampled_answers(rows)
    evaluations = [*_evaluations(results), *([sampled] if sampled else [])]
    return Traces(curves, coefficients, ancestries, evaluations)


def _own_paths(result: Mapping[str, Any]) -> list[str]:
    """The path of the model that the job made: the last of its rows."""
    rows = result.get("comparison")
    last = rows[-1] if isinstance(rows, list) and rows else {}
    return [str(last["path"])] if isinstance(last, Mapping) and last.get("kind") in MADE_HERE else []


def _lineage(folder: Path) -> Mapping[str, Any]:
    try:
        lineage = json.loads((folder / LINEAGE).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return lineage if isinstance(lineage, dict) else {}


def _coefficients(result: Mapping[str, Any]) -> LayerCoefficients | None:
    """None for records of earlier versions, which lack what the page of a merge needs."""
    merge, targets = result.get("merge"), result.get("targets", [])
    if not isinstance(merge, Mapping) or not {"coefficients", "tensors", "events"} <= merge.keys():
        return None
    layers = MergeView(merge, targets).layers
    names = tuple(layer.name for layer in layers)
    return LayerCoefficients(tuple(targets), names, tuple(tuple(layer.coefficients) for layer in layers))


def _evaluations(results: Mapping[str, tuple[Path, Mapping[str, Any]]]) -> list[Evaluation]:
    """Newest first."""
    done = [
        (float(result.get("time", 0.0)), name, folder, str(result.get("command", "")))
        for name, (folder, result) in results.items()
        if result.get("stage") == "evaluate" and result.get("status") == "finished"
    ]
    found = [read_evaluation(name, folder, command) for _, name, folder, command in sorted(done, reverse=True)]
    return [one for one in found if one]
