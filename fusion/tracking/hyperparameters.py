"""The hyper-parameters of a sweep: settings whose values tell its models apart."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fusion.tracking.rows import KINDS, Kind
from fusion.tracking.summary import Comparison, ModelSummary, setting_name

METHOD: dict[Kind, str] = {"merged": "merge", "target": "source"}
"""What the models of a kind are named by: the merge method, the source of a target."""
SCALE = "scale"


class HyperParameter(NamedTuple):
    name: str
    values: tuple[Any, ...]
    """One per model of the comparison, plain JSON; None where the model has no such setting."""


def varying_settings(comparison: Comparison) -> list[HyperParameter]:
    """Settings that take several values within a kind of model: the method first, then by name."""
    settings = [_named(model) for model in comparison.models]
    names = dict.fromkeys(name for kind in KINDS for name in _varying(comparison.models, settings, kind))
    order = sorted(names, key=lambda name: (name not in METHOD.values(), name != SCALE, name))
    return [HyperParameter(name, tuple(own.get(name) for own in settings)) for name in order]


def _named(model: ModelSummary) -> dict[str, Any]:
    row = model.rows[0]
    method = {METHOD[model.kind]: row.strategy or row.model} if model.kind in METHOD else {}
    return {**method, **{setting_name(key): value for key, value in model.settings.items()}}


def _varying(models: Sequence[ModelSummary], settings: Sequence[Mapping[str, Any]], kind: Kind) -> dict[str, None]:
    """A setting that only some methods have, at one value, follows from the method."""
    values: dict[str, set[str]] = {}
    for model, setting in zip(models, settings, strict=True):
        for name, value in setting.items() if model.kind == kind else ():
            values.setdefault(name, set()).add(json.dumps(value, sort_keys=True, default=str))
    return dict.fromkeys(name for name, found in values.items() if len(found) > 1)
