"""The comparison of a sweep's models on disk: `comparison.json`, `comparison.md` and a page that needs no network."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fusion.cache import write_json, write_text
from fusion.tracking.grouping import summarise
from fusion.tracking.rows import AVERAGE, KINDS, ComparisonRow, FailedJob, Kind, read_rows, read_runs
from fusion.tracking.summary import Comparison, ModelSummary, number_text, percent, share_text

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
    """Write `comparison.json` (one entry per row), `comparison.md` and `comparison.html` into `folder`; return them.

    Equal rows, in any order, give equal bytes. `command` is the one that made the whole sweep; `failures` are the
    jobs that have no scores, as `read_runs` gives them.
    """
    comparison = summarise(rows)
    failures = sorted(failures, key=lambda failure: (failure.job, failure.status, failure.reason))
    paths = [folder / f"comparison.{ending}" for ending in ("json", "md", "html")]
    write_json(paths[0], [row.to_json() for model in comparison.models for row in model.rows])
    write_text(paths[1], _markdown(comparison, title, command, failures))
    write_text(paths[2], _page(comparison, title, command, failures))
    return paths


def _page(comparison: Comparison, title: str, command: str | None, failures: Sequence[FailedJob]) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"percent": percent, "json": _compact}
    return environment.get_template(TEMPLATE).render(
        comparison=comparison,
        title=title,
        command=command,
        failures=failures,
        kinds=KIND_NAMES,
        average=AVERAGE,
        leaders=[model for kind in reversed(KINDS) if kind != "source" and (model := comparison.best(kind))],
        charted=[comparison.of_kind(kind)[:BARS_PER_KIND] for kind in KINDS if comparison.of_kind(kind)],
        heat=max((abs(x) for model in comparison.models for x in model.coefficients.values()), default=0.0) or 1.0,
        notes=_notes(comparison),
    )


def _compact(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


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


def _coefficient_text(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int | None = None) -> str:
    """A Markdown table of escaped cells; the first `left` columns (None: all) are aligned left, the others right."""
    rule = ["---" if left is None or column < left else "---:" for column in range(len(head))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, rule, *rows])


def _text(text: str) -> str:
    """`text` on one line, with the characters escaped that Markdown would read as its own."""
    return re.sub(r"[\\`*\[\]|<>~&#]|(?<!\w)_|_(?!\w)", r"\\\g<0>", " ".join(text.split()))
