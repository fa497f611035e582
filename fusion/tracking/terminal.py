"""The comparison on the terminal: models down, skills across."""

from collections.abc import Sequence

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fusion.tracking.grouping import summarise
from fusion.tracking.rows import KINDS, ComparisonRow, Kind
from fusion.tracking.summary import ModelSummary, percent

LOG_WIDTH = 100  # where the output is a file and has no width of its own
STYLES: dict[Kind, str] = {"pivot": "", "source": "magenta", "sft": "yellow", "target": "green", "merged": "cyan"}


def print_table(rows: Sequence[ComparisonRow], console: Console | None = None) -> None:
    """Print the scores in percent (over several seeds: means), and below them the leading numbers in one line.

    Merged models come last, so that they stand next to the prompt.
    """
    if console is None:
        console = Console()
        console = console if console.is_terminal else Console(width=LOG_WIDTH)
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
