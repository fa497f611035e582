"""`python -m fusion.alignment.show PIVOT SOURCE --text "..."`: two tokenisations of one text laid over each other.

It draws where either side cuts, and tells row by row which source row speaks and what the source's tokens become.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from fusion.alignment import row_table
from fusion.alignment.lanes import Lane, first_shared_cut, lay_out
from fusion.alignment.picture import picture
from fusion.alignment.plain_text import Comparison
from fusion.alignment.vocabularies import PATHS
from fusion.config import EXIT_USER_ERROR, UserError
from fusion.config.schema import ModelConfig

LOG_WIDTH = 100  # where the output is a file and has no width of its own
LEAST_WIDTH = 60
SHOWN_ROWS = 100
LEGEND = (
    "┼ both cut  ┴ only the pivot  ┬ only the source  · space  ⏎ line end  <0xNN> part of a character",
    "⟦ ⟧ special tokens, and what is not in the text; numbers count the tokens of either side",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print picture, table and shares; exit code 2 when something that was given cannot be used."""
    options = _parser().parse_args(arguments)
    from fusion.alignment import side_by_side  # loads transformers, which takes seconds

    request = side_by_side.Request(
        ModelConfig("pivot", options.pivot, chat_template=options.chat_template, end_of_turn=options.pivot_end),
        ModelConfig("source", options.source, end_of_turn=options.source_end),
        options.text,
        options.file,
        options.alignment,
        options.path,
        options.dialogues,
    )
    try:
        comparison, notes = side_by_side.compare(request)
    except UserError as error:
        print("\n".join(error.problems), file=sys.stderr)
        return EXIT_USER_ERROR
    _print(_console(options.width), comparison, notes, options.rows)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fusion.alignment.show", description=__doc__)
    parser.add_argument("pivot", metavar="PIVOT", help="tokeniser of the pivot: a folder or hub id")
    parser.add_argument("source", metavar="SOURCE", help="tokeniser of the source: a folder or hub id")
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--text", help="the text, read as one turn of an assistant")
    given.add_argument("--file", metavar="PATH", help="a file with the text; - reads the standard input")
    parser.add_argument("--alignment", default="ms", metavar="NAME", help="strategy, as in train.py (default: ms)")
    parser.add_argument("--path", choices=PATHS, help="how rows are laid side by side (default: the strategy's own)")
    parser.add_argument(
        "--dialogues", type=Path, metavar="FILE.jsonl", help="count statistics over these, not over the text alone"
    )
    parser.add_argument(
        "--rows", type=_at_least(0), default=SHOWN_ROWS, metavar="N", help="rows shown (default: 100; 0: all)"
    )
    parser.add_argument(
        "--width", type=_at_least(LEAST_WIDTH), metavar="N", help="columns (default: the terminal's, in a file 100)"
    )
    parser.add_argument("--pivot.end_of_turn", dest="pivot_end", metavar="TOKEN", help="what ends the pivot's turns")
    parser.add_argument(
        "--source.end_of_turn", dest="source_end", metavar="TOKEN", help="what ends the source's turns"
    )
    parser.add_argument(
        "--pivot.chat_template", dest="chat_template", metavar="NAME", help="template that --dialogues are read in"
    )
    return parser


def _at_least(least: int) -> Callable[[str], int]:
    def number(value: str) -> int:
        if not value.isdecimal() or int(value) < least:
            raise argparse.ArgumentTypeError(f"a whole number from {least} on is expected, not {value!r}")
        return int(value)

    return number


def _console(width: int | None) -> Console:
    console = Console(width=width)
    return console if console.is_terminal or width else Console(width=LOG_WIDTH)


def _print(console: Console, comparison: Comparison, notes: Sequence[str], num_rows: int) -> None:
    """What was compared, the picture, the table, the shares."""
    rows = min(num_rows or len(comparison), len(comparison))
    pivot, source = Lane.of(comparison.pivot), Lane.of(comparison.source)
    stop = first_shared_cut(pivot, source, max(1, int(comparison.pivot.ends_N[: rows + 1].max())))
    _say(console, *notes, "")
    for drawn in picture(lay_out(comparison.text, pivot, source, stop), console.width):
        console.print(drawn, no_wrap=True, overflow="ignore", crop=False)
    _say(console, *LEGEND, "", style="dim")
    console.print(row_table.row_table(comparison, rows))
    _say(console, *row_table.LEGEND, row_table.LEGENDS[comparison.alignment.kind.name], "", style="dim")
    if rows < len(comparison):
        _say(console, f"Not shown: {len(comparison) - rows:,} more rows (--rows 0 shows all).")
    _say(console, *row_table.sentences(comparison))


def _say(console: Console, *lines: str, style: str = "") -> None:
    for line in lines:
        console.print(Text(line, style))


if __name__ == "__main__":
    sys.exit(main())
