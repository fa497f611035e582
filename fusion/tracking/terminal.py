"""The comparison on the terminal, models down and skills across; what a run of stage 1 aligned and fused."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fusion.config.schema import AlignmentConfig
from fusion.tracking.grouping import summarise
from fusion.tracking.rows import KINDS, ComparisonRow, Kind
from fusion.tracking.stage1_report import (
    AlignmentReport,
    occurring_categories,
    occurring_kinds,
    read_alignment,
    read_fusion,
)
from fusion.tracking.summary import ModelSummary, count_text, decimal_text, percent

LOG_WIDTH = 100  # where the output is a file and has no width of its own
STYLES: dict[Kind, str] = {"pivot": "", "source": "magenta", "sft": "yellow", "target": "green", "merged": "cyan"}


def print_table(rows: Sequence[ComparisonRow], console: Console | None = None) -> None:
    """Print the scores in percent (over several seeds: means), and below them the leading numbers in one line.

    Merged models come last, so that they stand next to the prompt.
    """
    console = console or _console()
    comparison = summarise(rows)
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("kind", no_wrap=True)
    table.add_column("model", overflow="fold", min_width=12)
    for skill in comparison.skills:
        table.add_column(
            _clean(skill), justify="right", no_wrap=True, overflow="ellipsis", max_width=max(6, len(skill))
        )
    table.add_column("average", justify="right", no_wrap=True)
    table.add_column("NLL/byte", justify="right", no_wrap=True)
    for kind in KINDS:
        for number, model in enumerate(comparison.of_kind(kind)):
            table.add_row(Text(kind if number == 0 else "", STYLES[kind]), *_cells(model, comparison.skills))
        table.add_section()
    console.print(table)
    console.print(_clean(comparison.headline, "bold"), soft_wrap=True)


def print_stage1(
    report: Mapping[str, Any], alignment: AlignmentConfig, fusion: str, console: Console | None = None
) -> None:
    """Print the report of `fusion.training.prepare`: per source a table, then who won. Of SFT there is less to say."""
    console = console or _console()
    dialogues = report["dialogues"]
    dropped = sum(dialogues["dropped"].values())
    _say(console, f"dialogues: {dialogues['train']} to train on, {dialogues['heldout']} held out, {dropped} left out")
    sources = report.get("alignment", {})
    for source, written in sources.items():
        aligned = read_alignment(written)
        _say(console, "", f"{source}, alignment={alignment.name}, in percent")
        console.print(_alignment_table(aligned))
        _say(console, *_alignment_sentences(aligned, written))
    if sources:
        fused = read_fusion(report)
        _say(
            console,
            "",
            f"{fusion} won by, in dialogues (and tokens): {', '.join(fused.winners)}",
            f"trained on {count_text(fused.trained_on)} of {count_text(fused.dialogues)} dialogues; of "
            f"{count_text(fused.tokens)} tokens {percent(fused.fallback)}% fall back (fallback={alignment.fallback})",
        )


def _say(console: Console, *sentences: str) -> None:
    for sentence in sentences:
        console.print(_clean(sentence), soft_wrap=True)


def _alignment_table(report: AlignmentReport) -> Table:
    """Categories of text down, kinds across: the share of the category's tokens; then what the kinds are like."""
    kinds = occurring_kinds([report])
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("tokens", no_wrap=True)
    for name in ("share", "covered", "mass kept", *kinds):
        table.add_column(name, justify="right", no_wrap=True)
    whole = [1.0, report.covered, report.mass_kept, *(report.kinds[kind].share for kind in kinds)]
    table.add_row(f"all {count_text(report.tokens)}", *map(percent, whole))
    for name in occurring_categories([report]):
        part = report.categories[name]
        shares = [part.share, part.covered, part.mass_kept, *(part.kinds[kind] for kind in kinds)]
        table.add_row(name, *map(percent, shares))
    table.add_section()
    table.add_row("covered", "", "", "", *(percent(report.kinds[kind].covered) for kind in kinds))
    table.add_row("mass kept", "", "", "", *(percent(report.kinds[kind].mass_kept) for kind in kinds))
    return table


def _alignment_sentences(report: AlignmentReport, written: Mapping[str, Any]) -> list[str]:
    """What has no place in the table."""
    teacher, aligned = (decimal_text(size) for size in report.bytes_per_row.values())
    sentences = [f"bytes per row: {teacher} in the teacher's store, {aligned} aligned"]
    if written.get("dtw"):
        another, none, unread = (percent(share) for share in report.dtw.values())
        sentences.append(
            f"DTW path against exact bytes, in percent: another row {another}, no row {none}, unread row {unread} "
            f"({written['dtw']['dialogues']} dialogues)"
        )
    return sentences


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=LOG_WIDTH)


def _cells(model: ModelSummary, skills: Sequence[str]) -> list[Text]:
    style = STYLES[model.kind]
    spread = f"±{percent(model.average.sd)}" if model.average.sd is not None else ""
    nll_per_byte = model.nll_per_byte.mean
    verdict = f" {model.verdict}" if model.verdict else ""
    return [
        _clean(model.label, style) + Text(verdict, "dim"),
        *(Text(percent(model.scores[skill].mean), _strong(model, skill)) for skill in skills),
        Text(percent(model.average.mean), "bold") + Text(spread, "dim"),
        Text("-" if nll_per_byte is None else f"{nll_per_byte:.3f}"),
    ]


def _strong(model: ModelSummary, skill: str) -> str:
    return STYLES[model.kind] if skill in model.strong_skills else ""


def _clean(text: str, style: str = "") -> Text:
    """`text` without markup and without control characters, which could move the cursor."""
    return Text("".join(character if character.isprintable() else " " for character in text), style)
