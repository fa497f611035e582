"""The comparison of a sweep's models on disk: as JSON, CSV, Markdown and a page that needs no network."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from fusion.cache import write_json, write_text
from fusion.tracking.grouping import summarise
from fusion.tracking.page import render
from fusion.tracking.rows import AVERAGE, KINDS, ComparisonRow, FailedJob, Kind, read_rows, read_runs
from fusion.tracking.spreadsheet import csv_text
from fusion.tracking.stage1_report import RELATIONS, Line, comparison_lines, occurring_categories, occurring_kinds
from fusion.tracking.summary import (
    Comparison,
    ModelSummary,
    count_text,
    decimal_text,
    number_text,
    percent,
    share_text,
)

__all__ = ["ComparisonRow", "FailedJob", "read_rows", "read_runs", "write_comparison"]

TEMPLATE = "comparison.html.j2"
KIND_NAMES: dict[Kind, str] = {
    "pivot": "Pivot",
    "source": "Source",
    "sft": "SFT",
    "target": "Target",
    "merged": "Merged",
}
BARS_PER_KIND = 8  # a chart shows the leading models of every kind; the table has all


def write_comparison(
    folder: Path,
    rows: Sequence[ComparisonRow],
    *,
    title: str,
    command: str | None = None,
    failures: Sequence[FailedJob] = (),
) -> list[Path]:
    """Write `comparison.json` (one entry per row), `.md`, `.html` and `.csv` (a line per model) into `folder`.

    Returns their paths, in this order.

    Equal rows, in any order, give equal bytes. `command` is the one that made the whole sweep; `failures` are the
    jobs that have no scores, as `read_runs` gives them.
    """
    comparison = summarise(rows)
    failures = sorted(failures, key=lambda failure: (failure.job, failure.status, failure.reason))
    paths = [folder / f"comparison.{ending}" for ending in ("json", "md", "html", "csv")]
    write_json(paths[0], [row.to_json() for model in comparison.models for row in model.rows])
    write_text(paths[1], _markdown(comparison, title, command, failures))
    write_text(paths[2], _page(comparison, title, command, failures))
    write_text(paths[3], csv_text(comparison))
    return paths


def _page(comparison: Comparison, title: str, command: str | None, failures: Sequence[FailedJob]) -> str:
    lines = comparison_lines(comparison)
    reports = [line.alignment for line in lines]
    return render(
        TEMPLATE,
        comparison=comparison,
        title=title,
        command=command,
        failures=failures,
        kinds=KIND_NAMES,
        average=AVERAGE,
        leaders=[model for kind in reversed(KINDS) if kind != "source" and (model := comparison.best(kind))],
        charted=[comparison.of_kind(kind)[:BARS_PER_KIND] for kind in KINDS if comparison.of_kind(kind)],
        heat=max((abs(x) for model in comparison.models for x in model.coefficients.values()), default=0.0) or 1.0,
        lines=lines,
        relations=RELATIONS,
        shown_kinds=occurring_kinds(reports),
        shown_categories=occurring_categories(reports),
        notes=_notes(comparison),
    )


def _notes(comparison: Comparison) -> list[str]:
    """How the numbers were made."""
    return [
        "A score is the share of held-out questions to which the greedy answer matches the right one exactly. "
        "The average weighs every skill alike." + _items_text(comparison),
        "Over several seeds: mean ± standard deviation. Of one seed: the 95% interval that the number of questions "
        "gives (Wilson for a skill, normal for the average).",
        "A merge is called best only if the 95% interval of its average (Student's t over seeds, never narrower than "
        "the questions allow) meets that of no other merge; else it and those it meets are tied. The best of many "
        "is flattered by being chosen: confirm it on fresh seeds.",
        "NLL/byte is the negative log-likelihood of the reference answers, in nats per byte of their text; "
        "less is better.",
        *(_ALIGNMENT_NOTES if comparison_lines(comparison) else []),
    ]


_ALIGNMENT_NOTES = [
    "Alignment counts the pivot's supervised tokens. A token is 1-1 if it starts and ends where one token of the "
    "source does; 1-n if it goes on behind that token, n-1 if it ends inside of it; inner if it starts inside a "
    "source token; unread if the source's reading ends before it; unproven if nobody knows. Covered: the source says "
    "something about it. Mass kept: what pivot tokens get of the source's probability, mean over the tokens with a "
    "source row beside.",
    "Fallback: tokens for which no model chosen by the fusion function has anything to say. Won by: dialogues by the "
    "model with the most tokens, and the share of tokens that the function gave to it.",
    "DTW: how the authors' dynamic-programming path differs from exact byte spans on a sample of dialogues. Of the "
    "tokens with a source row by bytes: those for which the path names another row, or no row; of all others: those "
    "for which it names a row although the source has not read the same (unread row).",
    "Bytes per row: of the source's stored distributions, and of the same aligned to the pivot's tokens.",
]


def _items_text(comparison: Comparison) -> str:
    counts: dict[str, set[int]] = {skill: set() for skill in comparison.skills}
    for row in (row for model in comparison.models for row in model.rows):
        for skill, count in row.num_items.items():
            counts.setdefault(skill, set()).add(count)
    known = {skill: sorted({min(found), max(found)}) for skill, found in counts.items() if found}
    listed = ", ".join(f"{skill} {' to '.join(map(str, ends))}" for skill, ends in known.items())
    return f" Questions per skill: {listed}." if listed else ""


def _markdown(comparison: Comparison, title: str, command: str | None, failures: Sequence[FailedJob]) -> str:
    parts = [f"# {_text(title)}", _text(comparison.headline), _text(comparison.paired_difference)]
    parts.append(_scores_table(comparison))
    if comparison.targets:
        parts += ["## Mean coefficient of every target", _coefficients_table(comparison)]
    if lines := comparison_lines(comparison):
        parts += ["## Alignment and fusion", _alignment_table(lines)]
        parts += (
            ["### By kind of text", _categories_table(lines)] if any(x.alignment.categories for x in lines) else []
        )
    if failures:
        cells = [[_text(failure.job), _text(failure.status), _text(failure.reason)] for failure in failures]
        parts += ["## Jobs without scores", _table(["job", "status", "reason"], cells)]
    parts += ["## How the numbers were made", "\n".join(f"- {_text(note)}" for note in _notes(comparison))]
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
