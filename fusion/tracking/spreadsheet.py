"""The comparison as one flat table for spreadsheets and data frames: a line per model, a column per number."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from fusion.tracking.stage1_report import AlignmentReport, Line, mean, model_lines
from fusion.tracking.statistics import Estimate, estimate
from fusion.tracking.summary import Comparison, ModelSummary
from fusion.tracking.traces import NO_TRACES, Traces

Cells = dict[str, Any]
PART = ("share", "covered", "mass_kept")


def csv_text(comparison: Comparison, traces: Traces = NO_TRACES) -> str:
    """CSV with a heading; shares are fractions of 1, what is not known or does not apply is empty.

    Alignment numbers of a target with several sources are means over them.
    """
    models = [[*_groups(model), _training(model, traces)] for model in comparison.models]
    columns = dict.fromkeys(column for group in zip(*models, strict=True) for cells in group for column in cells)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    for groups in models:
        writer.writerow({column: _cell(value) for cells in groups for column, value in cells.items()})
    return text.getvalue()


def _groups(model: ModelSummary) -> list[Cells]:
    """Columns that belong together stay together, whichever model has them first."""
    lines = model_lines(model)
    return [
        {
            "label": model.label,
            "kind": model.kind,
            "strategy": model.rows[0].strategy,
            "model": model.rows[0].model,
            "seeds": len(model.average.values),
            "verdict": model.verdict,
        },
        _named("score", {f"{skill}.{key}": x for skill in model.scores for key, x in _spread(model.scores[skill])}),
        _named("nll_per_byte", dict(_spread(model.nll_per_byte))),
        {**_named("scale", dict(_spread(model.scale))), "scale.searched": any(x.scale_searched for x in model.rows)},
        _named("coefficient", model.coefficients),
        _named("setting", model.settings),
        *(_stage1_groups(lines) if lines else [{}] * 4),
    ]


def _training(model: ModelSummary, traces: Traces) -> Cells:
    """Of targets and SFT: the last loss over seeds; and the command of the first run."""
    curves = [traces.curves[row.path] for row in model.rows if row.path in traces.curves]
    commands = [row.command for row in model.rows if row.command]
    loss = _named("loss.last", dict(_spread(estimate([curve.last("loss") for curve in curves])))) if curves else {}
    steps = {"steps": max(curve.steps[-1] for curve in curves)} if curves else {}
    return {**steps, **loss, "command": next(iter(commands), "")}


def _stage1_groups(lines: Sequence[Line]) -> list[Cells]:
    fused = lines[0].fusion
    alignment = {
        "sources": " ".join(line.source for line in lines),
        "seeds": lines[0].seeds,
        **_alignment(mean([line.alignment for line in lines])),
    }
    fusion = {key: getattr(fused, key) for key in ("tokens", "fallback", "dialogues", "trained_on")}
    return [
        _named("alignment", alignment),
        _named("fusion", fusion),
        _named("fusion.who_won", fused.who_won),
        _named("fusion.rows_won", fused.rows_won),
    ]


def _named(prefix: str, cells: Mapping[str, Any]) -> Cells:
    return {f"{prefix}.{name}": value for name, value in cells.items()}


def _spread(number: Estimate) -> list[tuple[str, float | None]]:
    low, high = number.interval or (None, None)
    return [("mean", number.mean), ("sd", number.sd), ("low", low), ("high", high)]


def _alignment(report: AlignmentReport) -> Cells:
    parts = {**_named("kind", report.kinds), **_named("category", report.categories)}
    return {
        "tokens": report.tokens,
        "covered": report.covered,
        "mass_kept": report.mass_kept,
        **{f"{name}.{key}": getattr(part, key) for name, part in parts.items() for key in PART},
        **_named("dtw", report.dtw),
        **_named("bytes_per_row", report.bytes_per_row),
    }


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)
