"""What a strategy makes of a plain text, row by row, as a table and in sentences."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from fusion.alignment.glyphs import CUT, apart, visible
from fusion.alignment.plain_text import Comparison, written_id
from fusion.alignment.relations import RELATIONS
from fusion.alignment.rows import UNALIGNED
from fusion.alignment.target_kind import DISTRIBUTION, RANKS, SPANS
from fusion.alignment.vocabularies import BYTES, DTW, UNMAPPED

REFERENCE, UNRELATED, NONE = "=", "✗", "-"
DROPPED = apart("dropped")
STYLES = {REFERENCE: "bold green", UNRELATED: "bold red", REFERENCE + UNRELATED: "bold red", NONE: "dim"}
STYLES |= dict.fromkeys(RELATIONS[1:4], "yellow") | dict.fromkeys(RELATIONS[4:], "red")
WIDEST = 24  # columns of a token's text
LEGEND = (
    "kind: 1-1 cut alike, 1-n several source tokens, n-1 the beginning of one, inner a later part of one",
    "by: the source row that speaks; beside it what it has read, what it predicts, and what that becomes",
    "dtw, bytes: the row by the other path, where it is another one",
)
LEGENDS = {
    DISTRIBUTION: f"{REFERENCE} pivot token  {UNRELATED} neither begins with the other  {CUT} the pivot stands here",
    RANKS: "There is no map between tokens: sorted probabilities are compared, whichever tokens they are of.",
    SPANS: "There is no map between tokens: how likely either model finds the span's text is compared.",
}
"""What is to be known of the last columns, by the kind of targets."""


class Column(NamedTuple):
    heading: str
    cell: Callable[[int], str]
    """What it says of a row."""
    is_token: bool = False
    """Whether that is text of any length; else it is short and stands on the right."""


def row_table(comparison: Comparison, num_rows: int) -> Table:
    """The first `num_rows` rows of the pivot; numbers of rows are those of the tokens in the picture.

    Columns: the token that the row predicts, how it lies to the source's cuts, the source row that speaks (and where
    exact bytes and the published path disagree, the other one's), what that row has read and what it predicts, and
    what that becomes.
    """
    table = Table(box=SIMPLE, padding=0, show_edge=False)
    columns = list(_columns(comparison, num_rows))
    for column in columns:
        if column.is_token:  # these may shrink
            table.add_column(column.heading, max_width=WIDEST)
        else:
            table.add_column(column.heading, justify="right", no_wrap=True)
    for row in range(num_rows):
        table.add_row(*(_cell(column, row) for column in columns))
    return table


def _cell(column: Column, row: int) -> Text:
    text = column.cell(row)
    if column.is_token:
        return Text(text, no_wrap=True, overflow="ellipsis")
    return Text(text, STYLES.get(text, ""))


def _columns(comparison: Comparison, num_rows: int) -> Iterator[Column]:
    pivot, source, speaker_R = comparison.pivot, comparison.source, comparison.speaker_R.tolist()

    def said(cell: Callable[[int], str]) -> Callable[[int], str]:
        return lambda row: cell(row) if speaker_R[row] >= 0 else ""

    yield Column("row", str)
    yield Column("pivot token", lambda row: pivot.written(row + 1), True)
    yield Column("id", lambda row: str(pivot.ids_N[row + 1]))
    yield Column("kind", lambda row: RELATIONS[comparison.relation_R[row]])
    yield Column("by", lambda row: _number(speaker_R[row]))
    is_bytes = comparison.alignment.pair.path == BYTES
    ours_R, other_R = comparison.walked_R if is_bytes else comparison.walked_R[::-1]
    if (ours_R != other_R)[:num_rows].any():
        name = DTW if is_bytes else BYTES
        yield Column(name, lambda row: _number(int(other_R[row])) if ours_R[row] != other_R[row] else "")
    yield Column("has read", said(lambda row: source.written(speaker_R[row])), True)
    yield Column("source token", said(lambda row: _said(comparison, row)), True)
    yield Column("id", said(lambda row: str(source.ids_N[speaker_R[row] + 1])))
    if comparison.alignment.kind.name == DISTRIBUTION:
        yield Column("becomes", said(lambda row: _target(comparison, row)), True)
        yield Column("id", lambda row: str(comparison.target_R[row]) if comparison.target_R[row] >= 0 else "")
        yield Column("", said(lambda row: _verdict(comparison, row)))
    if comparison.alignment.kind.name == SPANS:
        yield Column("span", lambda row: _span(comparison, row), True)


def _number(row: int) -> str:
    return str(row) if row >= 0 else NONE


def _said(comparison: Comparison, row: int) -> str:
    """The token that the speaking row predicts, with a cut where the pivot stands inside of it."""
    done, rest = comparison.said_parts(row) or (b"", b"")
    if done:
        return visible(done) + CUT + visible(rest)
    return comparison.source.written(int(comparison.speaker_R[row]) + 1)


def _target(comparison: Comparison, row: int) -> str:
    target = int(comparison.target_R[row])
    return DROPPED if target == UNMAPPED else written_id(comparison.alignment.pair.pivot, target)


def _verdict(comparison: Comparison, row: int) -> str:
    if comparison.target_R[row] < 0:
        return ""
    return REFERENCE * bool(comparison.is_reference_R[row]) + UNRELATED * (not comparison.is_related_R[row])


def _span(comparison: Comparison, row: int) -> str:
    """What all rows of the row's span predict."""
    if comparison.target_R[row] < 0:
        return ""
    rows = np.flatnonzero(comparison.target_R == comparison.target_R[row]).tolist()
    return "".join(comparison.pivot.written(each + 1) for each in rows)


def sentences(comparison: Comparison) -> list[str]:
    """Rows by kind, what became of the source's tokens, and the published path against exact bytes."""
    return [_kinds(comparison), _fates(comparison), _paths(comparison)]


def _kinds(comparison: Comparison) -> str:
    counts = np.bincount(comparison.relation_R, minlength=len(RELATIONS)).tolist()
    shares = [_of(count, len(comparison), name) for name, count in zip(RELATIONS, counts, strict=True) if count]
    return f"{len(comparison)} rows of the pivot: {', '.join(shares)}."


def _fates(comparison: Comparison) -> str:
    speaks_R, mapped_R = comparison.speaker_R != UNALIGNED, comparison.target_R != UNMAPPED
    told = f"A source row speaks for {_of(int(speaks_R.sum()), len(comparison))} of them."
    if comparison.alignment.kind.name != DISTRIBUTION:
        return told
    same = int((mapped_R & comparison.is_reference_R).sum())
    other, unrelated = int(mapped_R.sum()) - same, int((mapped_R & ~comparison.is_related_R).sum())
    return (
        f"{told} There the source's own next token becomes the pivot's next token in {same}, another one in {other}, "
        f"none in {int((speaks_R & ~mapped_R).sum())}; in {unrelated} it becomes one with unrelated bytes."
    )


def _paths(comparison: Comparison) -> str:
    shares = comparison.path_shares
    others = f"; to {shares.unread} of the {shares.unknown} others it gives a row that has read something else"
    return (
        f"DTW path against exact bytes: of {shares.known} rows that have read the same as a source row, it gives "
        f"another row to {_of(shares.another, shares.known)}, none to {_of(shares.none, shares.known)}"
        f"{others if shares.unknown else ''}."
    )


def _of(count: int, total: int, name: str = "") -> str:
    return f"{name} {count} ({count / max(total, 1):.1%})".strip()
