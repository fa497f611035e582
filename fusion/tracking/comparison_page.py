"""The page of a comparison: one file that needs no network."""

from collections.abc import Sequence

from fusion.tracking.drawn import drawings, script_json, script_names
from fusion.tracking.hyperparameters import METHOD, SCALE, HyperParameter, varying_settings
from fusion.tracking.page import render
from fusion.tracking.rows import AVERAGE, KINDS, FailedJob, Kind
from fusion.tracking.stage1_report import RELATIONS, comparison_lines, occurring_categories, occurring_kinds
from fusion.tracking.summary import Comparison
from fusion.tracking.traces import Traces

TEMPLATE = "comparison.html.j2"
KIND_NAMES: dict[Kind, str] = {
    "pivot": "Pivot",
    "source": "Source",
    "sft": "SFT",
    "target": "Target",
    "merged": "Merged",
}
BARS_PER_KIND = 8  # a chart shows the leading models of every kind; the table has all
SETTINGS_SHOWN = 4  # columns of settings in the table at first; the chooser has all
FAILURES_SHOWN = 5
DRAWING_NAMES = {
    "parallel": "Hyper-parameters",
    "radar": "Radar",
    "heat": "Heat map",
    "curves": "Training",
    "lineage": "Lineage",
    "answers": "Answers",
}


def comparison_page(
    comparison: Comparison, title: str, command: str | None, failures: Sequence[FailedJob], traces: Traces
) -> str:
    settings = varying_settings(comparison)
    drawn = drawings(comparison, settings, traces)
    scripts = script_names(drawn)
    lines = comparison_lines(comparison)
    reports = [line.alignment for line in lines]
    return render(
        TEMPLATE,
        comparison=comparison,
        title=title,
        parts=_parts(comparison, scripts, traces),
        settings=settings,
        settings_shown=_shown_settings(settings),
        drawings=drawn,
        drawn=script_json(drawn),
        scripts=scripts,
        evaluations=[one for one in traces.evaluations if one.tests],
        most_failures=FAILURES_SHOWN,
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
        notes=notes(comparison),
    )


def _shown_settings(settings: Sequence[HyperParameter]) -> list[str]:
    """Settings that have a column at first; the method is in the model's name, the scale has a column of its own."""
    return [one.name for one in settings if one.name not in (*METHOD.values(), SCALE)][:SETTINGS_SHOWN]


def _parts(comparison: Comparison, scripts: Sequence[str], traces: Traces) -> dict[str, str]:
    """Anchor -> name, of the parts that the page has."""
    drawn = {f"part-{name}": text for name, text in DRAWING_NAMES.items() if name in scripts}
    tests = {"part-tests": "Paired tests"} if any(one.tests for one in traces.evaluations) else {}
    coefficients = {"coefficients": "Coefficients"} if comparison.targets else {}
    scored = {"bars": "Bars", **coefficients, "models": "Settings and commands"} if comparison.models else {}
    table = {"table": "Table"} if comparison.models else {}
    return {**table, **drawn, **tests, **scored, "notes": "Notes"}


def notes(comparison: Comparison) -> list[str]:
    """How the numbers were made."""
    return [
        "A score is the share of held-out questions to which the greedy answer matches the right one exactly. "
        "The average weighs every skill alike." + _items_text(comparison),
        "Over several seeds: mean ± standard deviation. Of one seed: the 95% interval that the number of questions "
        "gives (Wilson for a skill, normal for the average).",
        "A merge is called best only if the 95% interval of its average (Student's t over seeds, never narrower than "
        "the questions allow) meets that of no other merge; else it and those it meets are tied. The best of many "
        "is flattered by being chosen: confirm it on fresh seeds.",
        "A star marks the best merge of a column (the best target, where there are not two merges) only if its 95% "
        "interval lies above that of every other one.",
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
