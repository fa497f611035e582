"""The comparison of a sweep's models on disk: as JSON, CSV, Markdown and a page that needs no network."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from fusion.cache import write_json, write_text
from fusion.tracking.comparison_page import KIND_NAMES, comparison_page, notes
from fusion.tracking.evaluations import Evaluation
from fusion.tracking.grouping import summarise
from fusion.tracking.hyperparameters import HyperParameter, varying_settings
from fusion.tracking.rows import AVERAGE, ComparisonRow, FailedJob, read_rows, read_runs
from fusion.tracking.spreadsheet import csv_text
from fusion.tracking.stage1_report import Line, comparison_lines, occurring_kinds
from fusion.tracking.statistics import estimate
from fusion.tracking.summary import (
    Comparison,
    ModelSummary,
    count_text,
    decimal_text,
    number_text,
    percent,
    share_text,
)
from fusion.tracking.traces import NO_TRACES, Traces, read_traces

__all__ = ["ComparisonRow", "FailedJob", "read_rows", "read_runs", "read_traces", "write_comparison"]


def write_comparison(
    folder: Path,
    rows: Sequence[ComparisonRow],
    *,
    title: str,
    command: str | None = None,
    failures: Sequence[FailedJob] = (),
    traces: Traces = NO_TRACES,
) -> list[Path]:
    """Write `comparison.json` (one entry per row), `.md`, `.html` and `.csv` (a line per model) into `folder`.

    Returns their paths, in this order.

    Equal rows, in any order, give equal bytes. `command` is the one that made the whole sweep; `failures` are the
    jobs that have no scores, as `read_runs` gives them; `traces` is what `read_traces` found beside the scores.
    """
    comparison = summarise(rows)
    failures = sorted(failures, key=lambda failure: (failure.job, failure.status, failure.reason))
    paths = [folder / f"comparison.{ending}" for ending in ("json", "md", "html", "csv")]
    write_json(paths[0], [row.to_json() for model in comparison.models for row in model.rows])
    write_text(paths[1], _markdown(comparison, title, command, failures, traces))
    write_text(paths[2], comparison_page(comparison, title, command, failures, traces))
    write_text(paths[3], csv_text(comparison, traces))
    return paths


def _markdown(
    comparison: Comparison, title: str, command: str | None, failures: Sequence[FailedJob], traces: Traces
) -> str:
    parts = [f"# {_text(title)}", _text(comparison.headline), _text(comparison.paired_difference)]
    parts.append(_scores_table(comparison))
    if settings := varying_settings(comparison):
        parts += ["## Settings that vary", _settings_table(comparison, settings)]
    if comparison.targets:
        parts += ["## Mean coefficient of every target", _coefficients_table(comparison)]
    if lines := comparison_lines(comparison):
        parts += ["## Alignment and fusion", _alignment_table(lines)]
        parts += (
            ["### By kind of text", _categories_table(lines)] if any(x.alignment.categories for x in lines) else []
        )
    if traces.curves:
        parts += ["## Training", _training_table(comparison, traces)]
    for one in traces.evaluations:
        parts += [f"## Paired tests of {_text(one.job)}", _tests_table(one)] if one.tests else []
    if failures:
        cells = [[_text(failure.job), _text(failure.status), _text(failure.reason)] for failure in failures]
        parts += ["## Jobs without scores", _table(["job", "status", "reason"], cells)]
    parts += ["## How the numbers were made", "\n".join(f"- {_text(note)}" for note in notes(comparison))]
    if command:
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", command)), default=0))
        parts += ["## Command", f"{fence}sh\n{command}\n{fence}"]
    return "\n\n".join(part for part in parts if part) + "\n"


def _scores_table(comparison: Comparison) -> str:
    head = [
        "model",
        "kind",
        *map(_text, comparison.skills),
        AVERAGE,
        "average per seed",
        "NLL/byte",
        "scale",
        "verdict",
    ]
    return _table(head, [_scores_cells(model, comparison.skills) for model in comparison.models], left=2)


def _scores_cells(model: ModelSummary, skills: Iterable[str]) -> list[str]:
    shares = [_text(share_text(model.scores[skill])) for skill in skills]
    average = share_text(model.average)
    per_seed = " ".join(map(percent, model.average.values))
    scale = model.scale_text.removeprefix("scale ")
    cells = [f"**{_text(average)}**", per_seed, number_text(model.nll_per_byte), scale, model.verdict]
    return [_text(model.label), KIND_NAMES[model.kind], *shares, *cells]


def _coefficients_table(comparison: Comparison) -> str:
    merged = [model for model in comparison.of_kind("merged") if model.coefficients]
    cells = [
        [_text(model.label), *(_coefficient_text(model.coefficients.get(target)) for target in comparison.targets)]
        for model in merged
    ]
    return _table(["merge", *map(_text, comparison.targets)], cells, left=1)


def _settings_table(comparison: Comparison, settings: Sequence[HyperParameter]) -> str:
    cells = [
        [_text(model.label), *("" if one.values[place] is None else _text(str(one.values[place])) for one in settings)]
        for place, model in enumerate(comparison.models)
        if any(one.values[place] is not None for one in settings)
    ]
    return _table(["model", *(_text(one.name) for one in settings)], cells)


def _training_table(comparison: Comparison, traces: Traces) -> str:
    runs = [(model, row) for model in comparison.models for row in model.rows if row.path in traces.curves]
    cells = [
        [_text(model.label), str(row.seed), str(curve.steps[-1]), number_text(estimate([curve.last("loss")]))]
        for model, row in runs
        for curve in (traces.curves[row.path],)
    ]
    return _table(["model", "seed", "steps", "last loss"], cells, left=1)


def _tests_table(evaluation: Evaluation) -> str:
    head = ["scorer", "first", "second", "difference [95%]", "p", "p (Holm)", "first is"]
    cells = [
        [
            *map(_text, (test.scorer, test.first, test.second)),
            f"{test.difference_text} [{test.interval_text}]",
            _text(test.p_text),
            _text(test.adjusted_text),
            test.verdict,
        ]
        for test in evaluation.tests
    ]
    return _table(head, cells, left=3)


def _alignment_table(lines: Sequence[Line]) -> str:
    """Of the pivot's supervised tokens, in percent."""
    kinds = occurring_kinds([line.alignment for line in lines])
    head = ["target", "source", "strategy", "won by: dialogues (tokens)", "tokens", "covered", *kinds, "mass kept"]
    head += ["fallback", "DTW: another row", "no row", "unread row", "trained on", "of dialogues"]
    head += ["bytes per row", "aligned", "seeds"]
    return _table(head, [_alignment_cells(line, kinds) for line in lines], left=4)


def _alignment_cells(line: Line, kinds: Sequence[str]) -> list[str]:
    aligned, fused = line.alignment, line.fusion
    shares = [aligned.kinds[kind].share if kind in aligned.kinds else None for kind in kinds]
    return [
        *map(_text, (line.label, line.source, line.strategy, ", ".join(fused.winners))),
        count_text(aligned.tokens),
        *map(percent, (aligned.covered, *shares, aligned.mass_kept, fused.fallback, *aligned.dtw.values())),
        *map(count_text, (fused.trained_on, fused.dialogues)),
        *map(decimal_text, aligned.bytes_per_row.values()),
        str(line.seeds),
    ]


def _categories_table(lines: Sequence[Line]) -> str:
    """A line per category that a source has tokens of."""
    kinds = occurring_kinds([line.alignment for line in lines])
    cells = [
        [
            *map(_text, (line.label, line.source, line.strategy, name)),
            *map(percent, (part.share, part.covered, part.mass_kept, *(part.kinds[kind] for kind in kinds))),
        ]
        for line in lines
        for name, part in line.alignment.categories.items()
        if part.share
    ]
    return _table(["target", "source", "strategy", "text", "share", "covered", "mass kept", *kinds], cells, left=4)


def _coefficient_text(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int | None = None) -> str:
    """A Markdown table of escaped cells; the first `left` columns (None: all) are aligned left, the others right."""
    rule = ["---" if left is None or column < left else "---:" for column in range(len(head))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, rule, *rows])


def _text(text: str) -> str:
    """`text` on one line, with the characters escaped that Markdown would read as its own."""
    return re.sub(r"[\\`*\[\]|<>~&#]|(?<!\w)_|_(?!\w)", r"\\\g<0>", " ".join(text.split()))
