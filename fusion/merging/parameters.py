"""A method's parameters, checked against its function's signature: there is no second schema to keep in step."""

import difflib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from fusion.config import UserError
from fusion.merging.method import MergeMethod, Parameters, load_method
from fusion.merging.varying import GRADIENT, ByName, Gradient, is_gradient, varying


@dataclass(frozen=True)
class Between:
    """Limits of a number, the lower one included unless `above`; used as `Annotated[float, Between(0, 1)]`."""

    low: float
    high: float
    above: bool = False

    def allows(self, value: float) -> bool:
        return (self.low < value if self.above else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        return f"{'above' if self.above else 'from'} {self.low:g} to {self.high:g}"


Share = Annotated[float, Between(0, 1)]
PositiveShare = Annotated[float, Between(0, 1, above=True)]
Shares = Share | list[Share]
Weight = float | list[float]
Importance = Annotated[float, Between(0, math.inf)]
Importances = Importance | list[Importance]
Density = PositiveShare | list[PositiveShare]


@dataclass(frozen=True)
class Option:
    """One parameter of a method: its annotated type and its default (`inspect.Parameter.empty`: required)."""

    kind: Any
    default: Any
    measures: bool = False
    """It belongs to what is measured before the merge, so it cannot vary over the tensors."""


@cache
def options_of(method: MergeMethod[...]) -> Mapping[str, Option]:
    """The parameters that a user may set: the function's keywords, and those of what measures its evidence."""
    own = _keywords(method.function, False)
    return own if method.evidence is None else {**own, **_keywords(method.evidence, True)}


def _keywords(function: Callable[..., object], measures: bool) -> dict[str, Option]:
    hints = get_type_hints(function, include_extras=True)
    return {
        parameter.name: Option(hints[parameter.name], parameter.default, measures)
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    }


def with_defaults(method: MergeMethod[...], parameters: Parameters) -> dict[str, object]:
    """All parameters of `method`, in the signature's order, given ones over defaults; see `fusion.merging.varying`."""
    return {name: varying(parameters.get(name, option.default)) for name, option in options_of(method).items()}


def check_parameters(
    method: str | MergeMethod[...], parameters: Parameters, *, num_targets: int | None = None
) -> list[str]:
    """Every problem with `parameters` (names, types, ranges, list lengths), each with what to do; empty when good."""
    if isinstance(method, str):
        try:
            method = load_method(method)
        except UserError as error:
            return error.problems
    options = options_of(method)
    problems = [_unknown(name, options) for name in parameters if name not in options]
    for name, option in options.items():
        if name in parameters:
            check = _plain_problems if option.measures else _value_problems
            problems += check(name, parameters[name], option.kind, num_targets)
        elif option.default is inspect.Parameter.empty:
            problems.append(f"{name} is missing: {_describe(option.kind)}")
    if not problems:
        problems = _joint_problems(method, with_defaults(method, parameters))
    return [f"merge method '{method.name}': {problem}" for problem in problems]


def per_target(value: float | Sequence[float], num_targets: int) -> Tensor:
    """One number for all targets, or one each, as float64 [J]."""
    values = [value] * num_targets if isinstance(value, int | float) else value
    return torch.tensor(values, dtype=torch.float64)


def normalizable(parameters: Parameters) -> list[str]:
    """Method check: weights that are to be divided by their sum must not sum to zero."""
    weight: Any = parameters["weight"]
    total = weight if isinstance(weight, int | float) else sum(weight)
    if parameters["normalize"] and abs(total) < 1e-8:
        return [f"weight {weight} sums to zero and cannot be normalized: change it, or set normalize to false"]
    return []


def rankable(parameters: Parameters) -> list[str]:
    """Method check: weights as in `normalizable`, and probabilities density +- epsilon must be between 0 and 1."""
    density: Any = parameters["density"]
    epsilon: Any = parameters["epsilon"]
    densities = [density] if isinstance(density, int | float) else density
    wrong = [one for one in densities if one < 1 and not epsilon <= one <= 1 - epsilon]
    return normalizable(parameters) + [
        f"density {one:g} +- epsilon {epsilon:g} leaves 0 to 1, but they are probabilities: lower epsilon"
        for one in wrong
    ]


def _joint_problems(method: MergeMethod[...], parameters: Parameters) -> list[str]:
    """What is wrong with good values together; where some vary, the plan asks the method's check at every tensor."""
    vary = [name for name, value in parameters.items() if isinstance(value, Gradient | ByName)]
    if not vary:
        return method.check(parameters)
    return [
        f"{name} must be the same for all tensors here, since the method looks at the whole model at once"
        for name in method.model_wide(parameters)
        if name in vary
    ]


def importances(parameters: Parameters) -> list[str]:
    """Method check: weights whose shares are taken must not all be zero."""
    weight: Any = parameters["weight"]
    total = weight if isinstance(weight, int | float) else sum(weight)
    return [] if total > 0 else [f"weight {weight} gives no target a share: make one of them larger than 0"]


def _unknown(name: str, options: Mapping[str, Option]) -> str:
    near = difflib.get_close_matches(name, options, n=1)
    hint = f"did you mean '{near[0]}'? " if near else ""
    takes = f"It takes {', '.join(options)}" if options else "It takes no parameters"
    return f"no parameter '{name}': {hint}{takes}"


def _value_problems(name: str, value: object, kind: Any, num_targets: int | None) -> list[str]:
    if isinstance(value, Mapping) and _numbers(kind):
        return _varying_value_problems(name, value, kind, num_targets)
    return _plain_problems(name, value, kind, num_targets)


def _plain_problems(name: str, value: object, kind: Any, num_targets: int | None) -> list[str]:
    if not _fits(value, kind):
        near = difflib.get_close_matches(str(value), get_args(kind), n=1) if get_origin(kind) is Literal else []
        hint = f" (did you mean '{near[0]}'?)" if near else ""
        hint += _gradient_hint(name, value, kind)
        return [f"{name} must be {_describe(kind)}, got {value!r}{hint}"]
    if isinstance(value, list | tuple) and num_targets is not None and len(value) != num_targets:
        return [f"{name} lists {len(value)} numbers for {num_targets} targets: give one number, or one per target"]
    return []


def _varying_value_problems(name: str, value: Mapping[Any, object], kind: Any, num_targets: int | None) -> list[str]:
    if not value:
        return [f"{name} is an empty mapping: give PATTERN: VALUE for tensors, or {GRADIENT}: [FIRST, ..., LAST]"]
    problems = []
    if not is_gradient(value):
        for pattern, one in value.items():
            case = f"{name}['{pattern}']"
            if isinstance(one, Mapping) and not is_gradient(one):
                problems.append(f"{case} must be a value or a gradient, got {dict(one)!r}")
            else:
                problems += _value_problems(case, one, kind, num_targets)
        return problems
    anchors = value[GRADIENT]
    if float not in _numbers(kind):
        return [f"{name} must be {_describe(kind)}: there is nothing between whole numbers for a gradient"]
    if not isinstance(anchors, list | tuple) or len(anchors) < 2:
        return [f"{name}: a gradient is a list of two or more anchors, first layer to last, got {anchors!r}"]
    for place, anchor in enumerate(anchors):
        if isinstance(anchor, Mapping):
            problems.append(f"{name}: anchor {place} must be {_describe(kind)}, got {dict(anchor)!r}")
        else:
            problems += _value_problems(f"{name}: anchor {place}", anchor, kind, num_targets)
    return problems


def _gradient_hint(name: str, value: object, kind: Any) -> str:
    """For a list where one number is expected: it may be meant for the layers."""
    single = isinstance(value, list | tuple) and not isinstance(value, str) and float in _numbers(kind)
    return f"; over the layers: {name}={{{GRADIENT}: [FIRST, ..., LAST]}}" if single else ""


def _numbers(kind: Any) -> set[type]:
    """Which of float and int a kind allows, alone or in lists."""
    if kind in (float, int):
        return {kind}
    if get_origin(kind) is Literal:
        return set()
    members = get_args(kind)[:1] if get_origin(kind) is Annotated else get_args(kind)
    return set().union(*map(_numbers, members))


def _fits(value: object, kind: Any) -> bool:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(_fits(value, member) for member in arguments)
    if origin is Annotated:
        return _fits(value, arguments[0]) and all(limit.allows(value) for limit in arguments[1:])
    if origin is Literal:
        return value in arguments
    if origin is list:
        return isinstance(value, list | tuple) and all(_fits(member, arguments[0]) for member in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


def _describe(kind: Any) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(_describe(member) for member in arguments)
    if origin is Annotated:
        return " ".join([_describe(arguments[0]), *map(str, arguments[1:])])
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is list:
        return f"a list of {_describe(arguments[0]).removeprefix('a ').replace('number', 'numbers')}"
    words = {float: "a number", int: "a whole number", bool: "true or false", str: "a text", NoneType: "null"}
    return words.get(kind, str(kind))
