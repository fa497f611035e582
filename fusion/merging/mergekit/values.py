"""A parameter's value as mergekit writes it - a word, a number, a gradient, cases by filter - as one of ours."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fusion.config import UserError
from fusion.merging.mergekit.rules import REQUIRED
from fusion.merging.varying import GRADIENT

FILTER = re.compile(r"[\w.\-]+")
EVERYTHING = (None, "*")


class Case(NamedTuple):
    """`anchors`, evenly over the layers (a single one: everywhere), for tensors whose names contain `filter`."""

    filter: str | None
    anchors: tuple[Any, ...]


def cases_of(settings: Sequence[object]) -> list[Case]:
    """The cases of a parameter, the first that fits decides; the last one is for all tensors that are left.

    `settings`: what may decide, the strongest first (the model's, the configuration's, the default).

    Raises:
        UserError: a value that is none, or tensors for which nothing is said.
    """
    cases: list[Case] = []
    for setting in settings:
        if setting is REQUIRED:
            raise UserError("is missing" if not cases else "has no value for tensors that no filter fits")
        for one in _conditions(setting):
            pattern = one.get("filter")
            if pattern not in EVERYTHING and not FILTER.fullmatch(str(pattern)):
                raise UserError(f"has a filter '{pattern}': only letters, digits and _ . - can be kept")
            anchors = one["value"] if isinstance(one["value"], list) else [one["value"]]
            if not anchors or any(isinstance(anchor, Mapping | list) for anchor in anchors):
                raise UserError(f"is no value or list of values: {one['value']!r}")
            cases.append(Case(None if pattern in EVERYTHING else str(pattern), tuple(map(_number, anchors))))
            if cases[-1].filter is None:
                return cases
    raise AssertionError("the last setting is the default")


def combined(cases_of_targets: Sequence[Sequence[Case]]) -> Any:
    """One value of ours for the cases of every target.

    Raises:
        UserError: targets whose filters differ.
    """
    filters = [tuple(case.filter for case in cases) for cases in cases_of_targets]
    longest = max(filters, key=len)
    if any(each not in (longest, (None,)) for each in filters):
        raise UserError("has other filters for one model than for another: give all models the same, in one order")
    rows = [list(cases) * (len(longest) if len(cases) == 1 else 1) for cases in cases_of_targets]
    values = [_value([row[place].anchors for row in rows]) for place in range(len(longest))]
    if longest == (None,):
        return values[0]
    decided: dict[str, Any] = {}
    for one, value in zip(longest, values, strict=True):
        decided.setdefault("*" if one is None else f"*{one}*", value)
    return decided


def _conditions(setting: object) -> list[dict[str, Any]]:
    """Values with their filters."""
    if isinstance(setting, list) and any(isinstance(one, Mapping) for one in setting):
        conditions = setting
    elif isinstance(setting, Mapping):
        conditions = [setting]
    else:
        return [{"value": setting}]
    for one in conditions:
        if not isinstance(one, Mapping) or "value" not in one or set(one) - {"value", "filter"}:
            raise UserError(f"must list mappings with `value` and `filter`, got {one!r}")
    return [dict(one) for one in conditions]


def _number(value: object) -> object:
    """YAML takes 1e-5 for a text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _value(anchors_of_targets: Sequence[Sequence[Any]]) -> Any:
    """A value of ours from each target's anchors: all get as many as it takes to have everybody's among them."""
    steps = math.lcm(*(len(anchors) - 1 for anchors in anchors_of_targets if len(anchors) > 1))
    if all(len(anchors) == 1 for anchors in anchors_of_targets):
        return _alike([anchors[0] for anchors in anchors_of_targets])
    if not all(isinstance(anchor, int | float) for anchors in anchors_of_targets for anchor in anchors):
        raise UserError("is a gradient of words: only numbers can go along the layers")
    places = range(steps + 1)
    return {GRADIENT: [_alike([_at(anchors, place, steps) for anchors in anchors_of_targets]) for place in places]}


def _at(anchors: Sequence[float], place: int, steps: int) -> float:
    before, past = divmod(place * (len(anchors) - 1), steps)
    if not past:
        return anchors[before]
    return anchors[before] + past / steps * (anchors[before + 1] - anchors[before])


def _alike(values: list[Any]) -> Any:
    return values[0] if all(value == values[0] for value in values) else values
