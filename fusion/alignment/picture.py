"""The two lanes as lines of text, with a rail between them whose signs point at the lane that cuts.

`┼`: both cut here; `┴`: only the pivot, above; `┬`: only the source, below. Blanks only fill up, so nothing is lost
where there is no colour.
"""

from collections.abc import Iterator, Sequence

from rich.cells import cell_len
from rich.text import Text

from fusion.alignment.glyphs import CUT, OPEN, SIGNS
from fusion.alignment.lanes import Cell

BOTH, PIVOT_ONLY, SOURCE_ONLY, RAIL = "┼", "┴", "┬", "─"
RAIL_OF = {(True, True): BOTH, (True, False): PIVOT_ONLY, (False, True): SOURCE_ONLY}
STYLES = {BOTH: "bold green", PIVOT_ONLY: "yellow", SOURCE_ONLY: "yellow", RAIL: "dim", CUT: "dim", OPEN: "magenta"}
STYLES |= dict.fromkeys(SIGNS.values(), "cyan")
"""By the first sign of what is drawn."""
NAMES = "pivot", "source"


def picture(cells: Sequence[Cell], width: int) -> Iterator[Text]:
    """Lines of at most `width` columns: per wrapped line the pivot, the rail and the source, then an empty line.

    In front stands the number of the token that the line begins with, or that goes on in it. Only a cell that is
    wider than a line by itself makes a longer one.
    """
    digits = max(len(str(number)) for number in cells[-1].numbers)
    labels = [f"{name:<{max(map(len, NAMES))}} {{:>{digits}}} " for name in NAMES]
    margin = cell_len(labels[0].format(0))
    for line in wrapped(cells, width - margin):
        first = next((cell for cell in line if not any(cell.is_cut)), line[0])
        upper, lower = (
            Text(label.format(number), "bold") for label, number in zip(labels, first.numbers, strict=True)
        )
        rail = Text(" " * margin)
        for cell in line:
            for lane, glyph in zip((upper, lower), cell.glyphs, strict=True):
                lane.append(glyph + " " * (cell.width - cell_len(glyph)), STYLES.get(glyph[:1], ""))
            sign = RAIL_OF.get(cell.is_cut, RAIL * cell.width)
            rail.append(sign, STYLES[sign[0]])
        yield from (upper, rail, lower, Text())


def wrapped(cells: Sequence[Cell], room: int) -> Iterator[Sequence[Cell]]:
    """Lines of at most `room` columns; a cut where a line ends is drawn again where the next one begins."""
    start = 0
    while start < len(cells):
        stop, used = start + 1, cells[start].width
        while stop < len(cells) and used + cells[stop].width <= room:
            stop, used = stop + 1, used + cells[stop].width
        if stop < len(cells):
            stop = _break(cells, start, stop)
        yield cells[start:stop]
        again = stop < len(cells) and any(cells[stop - 1].is_cut)
        start = stop - again


def _break(cells: Sequence[Cell], start: int, stop: int) -> int:
    """Behind the last cut of both lanes in the second half of the line, else the last one of either, else `stop`."""
    inner = range(stop - 1, start, -1)
    halfway = start + (stop - start) // 2
    shared = next((at for at in inner if at >= halfway and all(cells[at].is_cut)), None)
    either = next((at for at in inner if any(cells[at].is_cut)), stop - 1)
    return (either if shared is None else shared) + 1
