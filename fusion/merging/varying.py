"""Values of a numeric parameter that vary over a model's tensors.

    0.3                             one for all
    [0.3, 0.5]                      one for each target, where the parameter is about targets
    {gradient: [0.2, 0.6, 0.2]}     over the layers: anchors from the first to the last, straight lines between
    {"*mlp*": 0.4, "*": 0.2}        by name: the first pattern that fits a tensor decides (* ? [abc] as in file names)

A pattern's value and an anchor may be one for each target again, and a pattern's value a gradient.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import zip_longest
from typing import Any

from fusion.merging.layers import LAYER

GRADIENT = "gradient"
SHOWN = 3


@dataclass(frozen=True)
class Gradient:
    """Anchors in equal steps over the layers; mergekit knows gradients, too, but gives the head the first anchor."""

    anchors: tuple[Any, ...]

    def at(self, name: str, depth: float) -> Any:
        """The value at a depth from 0 to 1."""
        place = depth * (len(self.anchors) - 1)
        before = min(int(place), len(self.anchors) - 2)
        return _between(self.anchors[before], self.anchors[before + 1], place - before)


@dataclass(frozen=True)
class ByName:
    """Patterns with their values, in order: the first that fits decides."""

    cases: tuple[tuple[str, Any], ...]

    def at(self, name: str, depth: float) -> Any:
        return value_at(next(value for pattern, value in self.cases if fnmatchcase(name, pattern)), name, depth)

    def problems(self, names: Sequence[str]) -> Iterator[str]:
        """Patterns that decide on no tensor, and tensors on which none decides."""
        deciding = {name: [pattern for pattern, _ in self.cases if fnmatchcase(name, pattern)] for name in names}
        for pattern, _ in self.cases:
            if all(pattern not in patterns for patterns in deciding.values()):
                yield f"pattern '{pattern}' fits no tensor; there are {_few(names)}"
            elif all(pattern not in patterns[:1] for patterns in deciding.values()):
                yield f"pattern '{pattern}' comes behind patterns that fit all its tensors: put it before them"
        bare = [name for name, patterns in deciding.items() if not patterns]
        if bare:
            yield f"no pattern fits {_few(bare)}: add '*' with the value of all others as the last one"


def varying(value: object) -> Any:
    """A parameter's value as a user writes it; mappings become `Gradient` and `ByName`."""
    if isinstance(value, Mapping):
        if is_gradient(value):
            return Gradient(tuple(value[GRADIENT]))
        return ByName(tuple((str(pattern), varying(one)) for pattern, one in value.items()))
    return value


def is_gradient(value: Mapping[Any, object]) -> bool:
    return set(value) == {GRADIENT}


def value_at(value: Any, name: str, depth: float) -> Any:
    """What `value` is for one tensor: a plain number, list, word."""
    return value.at(name, depth) if isinstance(value, Gradient | ByName) else value


def written(value: object) -> object:
    """`value` for a report in JSON; patterns as pairs, since objects have no order there."""
    if isinstance(value, Gradient):
        return {GRADIENT: list(value.anchors)}
    if isinstance(value, ByName):
        return {"patterns": [[pattern, written(one)] for pattern, one in value.cases]}
    return value


def varying_problems(parameter: str, value: object, names: Sequence[str]) -> list[str]:
    """How a value's patterns and gradients do not fit a model's tensors."""
    problems = list(value.problems(names)) if isinstance(value, ByName) else []
    parts = [one for _, one in value.cases] if isinstance(value, ByName) else [value]
    if any(isinstance(part, Gradient) for part in parts) and not any(map(LAYER.match, names)):
        problems.append(f"a gradient needs numbered layers, but there are only {_few(names)}")
    return [f"{parameter}: {problem}" for problem in problems]


def _between(first: Any, second: Any, share: float) -> Any:
    """The point between two anchors: numbers, or one for each target."""
    if isinstance(first, int | float) and isinstance(second, int | float):
        value = first + share * (second - first)
        return min(max(value, min(first, second)), max(first, second))
    firsts = first if isinstance(first, Sequence) else []
    seconds = second if isinstance(second, Sequence) else []
    pairs = zip_longest(firsts, seconds, fillvalue=None)
    return [_between(first if a is None else a, second if b is None else b, share) for a, b in pairs]


def _few(names: Sequence[str]) -> str:
    quoted = ", ".join(f"'{name}'" for name in names[:SHOWN])
    return f"{quoted} and {len(names) - SHOWN} more" if len(names) > SHOWN else quoted
