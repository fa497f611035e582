"""Two tokenisations of one text laid over each other, so that cuts at the same byte stand under each other.

Legend: a lane is one side's tokens in a line of boxes; a cell is a few columns of both lanes at once.
"""

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from typing import NamedTuple

from rich.cells import cell_len

from fusion.alignment.glyphs import CLOSE, CUT, OPEN, apart, glyph, hexed, is_mark, is_plain
from fusion.alignment.plain_text import ABSENT_SPACE, Reading


class Box(NamedTuple):
    """A token as a lane draws it, or several whose cuts are not known."""

    start: int
    """First byte; that of the end of turn is behind the text."""
    end: int
    number: int
    """Which token of the text it is, or begins with."""
    before: str = ""
    """Drawn in front of its text."""
    after: str = ""
    """Drawn behind its text."""
    label: str = ""
    """Drawn instead of text."""


class Unit(NamedTuple):
    """A character with its marks, or a part of one; no cut lies inside."""

    start: int
    end: int
    shown: str
    """What is drawn where the whole character is in one box; nothing for all parts but the first."""
    whole: tuple[int, int]
    """First byte and end of the whole."""


class Cell(NamedTuple):
    """Lines break between cells only."""

    glyphs: tuple[str, str]
    numbers: tuple[int, int]
    """The tokens of either side that it belongs to; those that begin at a cut."""
    is_cut: tuple[bool, bool] = (False, False)

    @property
    def width(self) -> int:
        """Columns of the terminal."""
        return max(map(cell_len, self.glyphs))


@dataclass(frozen=True)
class Lane:
    """The boxes of one side, found by byte."""

    wide: Sequence[Box]
    """Boxes with text, and the end of turn; ascending. Together they hold every byte."""
    narrow: dict[int, list[Box]]
    """Boxes of no width, by their byte."""
    cuts: frozenset[int]

    @classmethod
    def of(cls, reading: Reading) -> "Lane":
        wide: list[Box] = []
        narrow: dict[int, list[Box]] = defaultdict(list)
        for box in _boxes(reading):
            if box.start < box.end:
                wide.append(box)
            else:
                narrow[box.start].append(box)
        places = {place for box in wide for place in (box.start, box.end)}
        return cls(wide, dict(narrow), frozenset(places | narrow.keys()))

    def at(self, place: int) -> Box:
        """The box that holds byte `place`; the last one behind the end."""
        return self.wide[bisect_right(self.wide, place, key=lambda box: box.start) - 1]

    def drawn(self, units: Sequence[Unit], content: bytes) -> list[str]:
        """The glyphs of units between two cuts that follow each other, and what stands before and behind them."""
        box, start, end = self.at(units[0].start), units[0].start, units[-1].end
        glyphs = [_glyph(box, unit, content) for unit in units]
        return [box.before if box.start == start else "", *glyphs, box.after if box.end == end else ""]


def _glyph(box: Box, unit: Unit, content: bytes) -> str:
    if box.label:
        return box.label
    first, end = unit.whole
    return unit.shown if box.start <= first and end <= box.end else hexed(content[unit.start : unit.end])


def _boxes(reading: Reading) -> list[Box]:
    found: list[Box] = []
    start, waiting, last = 0, 0, len(reading)
    for number in range(last):
        end = int(reading.ends_N[number + 1])
        if end < 0:
            waiting += 1
            continue
        if waiting:
            found.append(_group(start, end, number - waiting, waiting + 1))
        else:
            found.append(_box(reading, start, number))
        start, waiting = end, 0
    size = len(reading.content)
    if start < size:
        found.append(_group(start, size, last - waiting, waiting))
    return [*found, Box(size, size + 1, last, label=reading.written(last + 1))]


def _group(start: int, end: int, number: int, count: int) -> Box:
    name = apart(f"{count} tokens")
    return Box(start, end, number, before=name) if start < end else Box(start, end, number, label=name)


def _box(reading: Reading, start: int, number: int) -> Box:
    position = number + 1
    end, space = int(reading.ends_N[position]), ABSENT_SPACE if reading.adds_space(position) else ""
    if start == end:
        return Box(start, end, number, label=space or reading.written(position))
    if not reading.table[int(reading.ids_N[position])]:
        return Box(start, end, number, before=OPEN, after=CLOSE)
    return Box(start, end, number, before=space)


def cut_units(text: str, cuts: Sequence[int]) -> list[Unit]:
    """The characters of `text`, divided at the bytes `cuts` (ascending), and the end of turn behind them."""
    found: list[Unit] = []
    start, joins = 0, False
    for character in text:
        end = start + len(character.encode("utf-8"))
        inner = cuts[bisect_right(cuts, start) : bisect_left(cuts, end)]
        is_begun = bisect_left(cuts, start) < bisect_right(cuts, start)
        if joins and is_mark(character) and not inner and not is_begun:
            base = found.pop()
            found.append(Unit(base.start, end, base.shown + character, (base.start, end)))
        else:
            bounds = pairwise([start, *inner, end])
            shown = [glyph(character), *[""] * len(inner)]
            found += [Unit(*bound, part, (start, end)) for bound, part in zip(bounds, shown, strict=True)]
            joins = is_plain(character) and not is_mark(character) and not inner
        start = end
    return [*found, Unit(start, start + 1, "", (start, start + 1))]


def lay_out(text: str, upper: Lane, lower: Lane, stop: int) -> list[Cell]:
    """The cells of both lanes up to byte `stop`, which both cut, from left to right."""
    content, drawn = text.encode("utf-8"), []
    cuts = sorted(cut for cut in upper.cuts | lower.cuts if cut <= stop)
    between: dict[int, list[Unit]] = defaultdict(list)
    for unit in cut_units(text, cuts):
        between[cuts[bisect_right(cuts, unit.start) - 1]].append(unit)
    for place in cuts[:-1]:
        numbers = upper.at(place).number, lower.at(place).number
        cut = Cell(_marks(place, upper, lower), numbers, (place in upper.cuts, place in lower.cuts))
        drawn.append(cut)
        for above, below in zip_longest(upper.narrow.get(place, []), lower.narrow.get(place, [])):
            glyphs = above.label if above else "", below.label if below else ""
            told = above.number if above else numbers[0], below.number if below else numbers[1]
            drawn += [Cell(glyphs, told), cut]
        both = zip(upper.drawn(between[place], content), lower.drawn(between[place], content), strict=True)
        drawn += [Cell(pair, numbers) for pair in both if any(pair)]
    return [*drawn, Cell(_marks(stop, upper, lower), (upper.at(stop).number, lower.at(stop).number), (True, True))]


def _marks(place: int, upper: Lane, lower: Lane) -> tuple[str, str]:
    return CUT if place in upper.cuts else "", CUT if place in lower.cuts else ""


def first_shared_cut(upper: Lane, lower: Lane, place: int) -> int:
    """The first byte from `place` on that both lanes cut; the end of turn's end at the latest."""
    return min(cut for cut in upper.cuts & lower.cuts if cut >= min(place, upper.wide[-1].end))
