"""What a merge method is: one typed function on one tensor's deltas, marked with `@merge_method`.

The function looks at the deltas in as many passes as it needs, and returns how a block of the merged delta is made:

    @merge_method(paper="https://arxiv.org/abs/2203.05482")
    def halves(deltas: TensorDeltas, *, weight: Share = 0.5) -> MergedDelta:
        norms_J = deltas.reduce(lambda block: squared_norms(block.deltas_JN)).sqrt()
        weights_J = weight * norms_J / norms_J.sum()
        return MergedDelta.weighted(weights_J)

It never sees files, threads, memory limits or dtypes. `fusion.merging.deltas` says what blocks and passes are.
Shapes: J targets, N elements of one block.
"""

import difflib
import importlib
import math
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, Literal, ParamSpec

import torch
from torch import Tensor

from fusion.config import UserError
from fusion.merging import methods
from fusion.merging.deltas import Block, ModelDeltas
from fusion.merging.evidence import Evidence
from fusion.merging.numerics.one_pass import WeightedSum

Arguments = ParamSpec("Arguments")
Parameters = Mapping[str, object]
Survey = Callable[[ModelDeltas, Parameters], object]
Measure = Callable[..., Evidence]
WholeBytes = Callable[[str, tuple[int, ...], int], int]
WHOLE_COPIES = 2
"""A method on whole tensors needs its deltas and as much again, unless it says otherwise."""


@dataclass(frozen=True)
class MergedDelta:
    """What a method makes of one tensor.

    `delta(block)`: float32 [N], added to the base after the engine scaled it; called once per block, in any order and
    from several threads. `coefficients`: [J], the weight that each target's delta was multiplied with (before a
    division per position, where a method has one). `events`: what a reader of the report should know, such as a
    fallback that was taken. A delta that is a `OnePass` is merged in one pass where that can be.
    """

    delta: Callable[[Block], Tensor]
    coefficients: Tensor
    events: tuple[str, ...] = ()

    @classmethod
    def weighted(cls, coefficients_J: Tensor, events: tuple[str, ...] = ()) -> "MergedDelta":
        """sum_j c_j d_j."""
        return cls(WeightedSum(coefficients_J), coefficients_J, events)


def _no_survey(model: ModelDeltas, parameters: Parameters) -> None:
    return None


def _none(parameters: Parameters) -> list[str]:
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
    whole: bool | WholeBytes
    survey: Survey
    check: Callable[[Parameters], list[str]]
    model_wide: Callable[[Parameters], list[str]]
    evidence: Measure | None
    unwidened: bool

    def __call__(self, *args: Arguments.args, **kwargs: Arguments.kwargs) -> MergedDelta:
        return self.function(*args, **kwargs)

    def whole_bytes(self, name: str, shape: tuple[int, ...], num_targets: int) -> int:
        """Memory that it needs for a tensor that it works on as a whole; 0 where it streams."""
        if callable(self.whole):
            return self.whole(name, shape, num_targets)
        return 4 * WHOLE_COPIES * (num_targets + 1) * math.prod(shape) if self.whole else 0


def merge_method(
    *,
    paper: str,
    needs_base: bool = True,
    operands: Literal["deltas", "weights"] = "deltas",
    num_targets: int | None = None,
    whole: bool | WholeBytes = False,
    survey: Survey = _no_survey,
    check: Callable[[Parameters], list[str]] = _none,
    model_wide: Callable[[Parameters], list[str]] = _none,
    evidence: Measure | None = None,
    unwidened: bool = False,
) -> Callable[[Callable[Arguments, MergedDelta]], MergeMethod[Arguments]]:
    """Mark `function(deltas: TensorDeltas, *, parameter=default, ...) -> MergedDelta` as a merge method.

    `paper`: URL of the formula. `needs_base`: refuse a merge without base; otherwise deltas are then taken from zero.
    `operands="weights"`: the function gets and returns whole weights, not deltas. `num_targets`: the only number of
    targets it takes. `whole`: it asks for `deltas.whole()`; memory is planned for it, or for what
    `whole(name, shape, num_targets)` says: bytes, 0 for a tensor that it streams. `survey(model, parameters)`: what
    must be known of the whole model before its first tensor is merged; the function finds the result in
    `deltas.survey`. `check(parameters)`: problems that the types of the signature cannot express.
    `model_wide(parameters)`: parameters that the survey reads, so that they must not vary over the tensors.
    `evidence`: the function that measures on dialogues what the method finds in `deltas.evidence`; its keywords are
    parameters of the method, too. `unwidened`: deltas come in the dtype of the models, not in float32;
    what the function returns is float32 all the same.
    """

    def mark(function: Callable[Arguments, MergedDelta]) -> MergeMethod[Arguments]:
        own = function.__module__ == f"{methods.__name__}.{function.__name__}"
        name = function.__name__ if own else f"{function.__module__}.{function.__name__}"
        return MergeMethod(
            function,
            name,
            paper,
            needs_base,
            operands,
            num_targets,
            whole,
            survey,
            check,
            model_wide,
            evidence,
            unwidened,
        )

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


def check_result(method: MergeMethod[...], delta: object, coefficients: object, operands_JN: Tensor) -> None:
    """Refuse what a method made of a block when it is not of the promised shape and type (`UserError`)."""
    num_targets, num_elements = operands_JN.shape
    delta_is_good = isinstance(delta, Tensor) and delta.shape == (num_elements,) and delta.dtype == torch.float32
    if not delta_is_good or not isinstance(coefficients, Tensor) or coefficients.shape != (num_targets,):
        got = [f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else repr(x) for x in (delta, coefficients)]
        raise UserError(
            f"merge method '{method.name}' must return a float32 delta of shape [{num_elements}] for this block and "
            f"coefficients of shape [{num_targets}], got {got[0]} and {got[1]}"
        )
