"""What a merge method is: one typed function on one tensor's deltas, marked with `@merge_method`.

Shapes: J targets, N elements of one tensor, flattened in row-major order.
"""

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, Literal, ParamSpec

import torch
from torch import Tensor

from fusion.config import UserError
from fusion.merging import methods

Arguments = ParamSpec("Arguments")
Parameters = Mapping[str, object]
Statistic = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class MergedDelta:
    """What a method makes of one tensor.

    `delta`: float32 [N], added to the base after the engine scaled it. `coefficients`: [J], the weight that each
    target's delta was multiplied with (before a division per position, where a method has one). `events`: what a
    reader of the report should know, such as a fallback that was taken.
    """

    delta: Tensor
    coefficients: Tensor
    events: tuple[str, ...] = ()


@dataclass(frozen=True)
class TensorContext:
    """What a method may know beside the deltas: the tensor's name, the seed, and the first pass's results by name."""

    name: str = ""
    seed: int = 0
    statistics: Mapping[str, Tensor] = field(default_factory=dict)


def _no_first_pass(parameters: Parameters) -> Statistic | None:
    return None


def _no_problems(parameters: Parameters) -> list[str]:
    return []


@dataclass(frozen=True)
class MergeMethod(Generic[Arguments]):
    """A merge function and what the engine must know about it. Calling it calls the function."""

    function: Callable[Arguments, MergedDelta]
    name: str
    paper: str
    needs_base: bool
    operands: Literal["deltas", "weights"]
    num_targets: int | None
    first_pass: Callable[[Parameters], Statistic | None]
    check: Callable[[Parameters], list[str]]

    def __call__(self, *args: Arguments.args, **kwargs: Arguments.kwargs) -> MergedDelta:
        return self.function(*args, **kwargs)


def merge_method(
    *,
    paper: str,
    needs_base: bool = True,
    operands: Literal["deltas", "weights"] = "deltas",
    num_targets: int | None = None,
    first_pass: Callable[[Parameters], Statistic | None] = _no_first_pass,
    check: Callable[[Parameters], list[str]] = _no_problems,
) -> Callable[[Callable[Arguments, MergedDelta]], MergeMethod[Arguments]]:
    """Mark `function(operands_JN, *, parameter=default, ..., context: TensorContext) -> MergedDelta` as a method.

    `paper`: URL of the formula. `needs_base`: refuse a merge without base; otherwise deltas are then taken from zero.
    `operands="weights"`: the function gets and returns whole weights, not deltas. `num_targets`: the only number of
    targets it takes. `first_pass(parameters)`: a statistic of [J, N] operands to be taken of every tensor before the
    first is merged, or None. `check(parameters)`: problems that the types of the signature cannot express.
    `context` is given to functions that ask for it.
    """

    def mark(function: Callable[Arguments, MergedDelta]) -> MergeMethod[Arguments]:
        own = function.__module__ == f"{methods.__name__}.{function.__name__}"
        name = function.__name__ if own else f"{function.__module__}.{function.__name__}"
        return MergeMethod(function, name, paper, needs_base, operands, num_targets, first_pass, check)

    return mark


def method_names() -> list[str]:
    """The methods that come with the package: one module each."""
    return sorted(module.name for module in pkgutil.iter_modules(methods.__path__))


def load_method(name: str) -> MergeMethod[...]:
    """The method `name` of this package, or the one at a dotted path such as `my_package.my_module.my_merge`.

    Raises:
        UserError: there is no such method, or what is there is not marked with `@merge_method`.
    """
    if "." not in name and name not in method_names():
        near = difflib.get_close_matches(name, method_names(), n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise UserError(
            f"merge method '{name}' is unknown: {hint}There are {', '.join(method_names())}; "
            "your own is named by its dotted path, such as my_package.my_module.my_merge"
        )
    path = name if "." in name else f"{methods.__name__}.{name}.{name}"
    module_name, _, attribute = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"merge method '{name}' cannot be imported: {error}") from error
    if not isinstance(found, MergeMethod):
        raise UserError(f"merge method '{name}' is a {type(found).__name__}: mark the function with @merge_method")
    return found


def check_result(method: MergeMethod[...], merged: MergedDelta, operands_JN: Tensor) -> None:
    """Refuse what a method returned when it is not of the promised shape and type (`UserError`)."""
    num_targets, num_elements = operands_JN.shape
    delta, coefficients = merged.delta, merged.coefficients
    if delta.shape != (num_elements,) or delta.dtype != torch.float32 or coefficients.shape != (num_targets,):
        raise UserError(
            f"merge method '{method.name}' must return a float32 delta of shape [{num_elements}] and coefficients of "
            f"shape [{num_targets}], got {delta.dtype} {list(delta.shape)} and {list(coefficients.shape)}"
        )
