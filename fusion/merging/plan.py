"""A merge, checked before anything is computed: every mistake is found and reported at once."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor

from fusion.config import UserError, raise_problems
from fusion.merging.checkpoints.checkpoint import Checkpoint
from fusion.merging.checkpoints.tensor_file import TensorSpec
from fusion.merging.evidence import Evidence
from fusion.merging.layers import LAYER, depths_of
from fusion.merging.method import MergeMethod, load_method
from fusion.merging.parameters import check_parameters, options_of, with_defaults
from fusion.merging.varying import value_at, varying_problems, written
from fusion.merging.vocabularies.vocabulary import CHOOSE

State = Mapping[str, Tensor]
Specs = Mapping[str, TensorSpec]
Input = TypeVar("Input")
MERGEABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SHOWN = 5


@dataclass(frozen=True)
class MergeRequest:
    """What is wanted of a merge, its inputs apart; `merge_state_dicts` says what the fields mean."""

    method: str
    parameters: Mapping[str, object] = field(default_factory=dict)
    scale: float = 1.0
    seed: int = 0
    evidence: Evidence | None = None

    def problems(self, has_base: bool, num_targets: int) -> list[str]:
        given = self.scale, self.seed, self.parameters, self.evidence
        return request_problems(self.method, has_base, num_targets, *given)

    def plan(self, base: State | None, targets: Sequence[State]) -> "MergePlan":
        """As `make_plan`."""
        return make_plan(
            self.method,
            base,
            targets,
            scale=self.scale,
            seed=self.seed,
            parameters=self.parameters,
            evidence=self.evidence,
        )


@dataclass(frozen=True)
class MergePlan:
    """A valid merge. `parameters` are complete; all inputs have the same tensors, shapes and dtypes.

    Some parameters may vary over the tensors; `parameters_at` are those of one tensor.
    """

    method: MergeMethod[...]
    parameters: Mapping[str, object]
    base: State | None
    targets: tuple[State, ...]
    scale: float
    seed: int
    evidence: Evidence | None = None

    @property
    def reference(self) -> State:
        """Where all that is not merged comes from."""
        return self.targets[0] if self.base is None else self.base

    @cached_property
    def inputs(self) -> dict[str, State]:
        """Base and targets by their roles."""
        return input_roles(self.base, self.targets)

    @cached_property
    def specs(self) -> Specs:
        return specs_of(self.reference)

    @cached_property
    def merged_names(self) -> list[str]:
        """Tensors that are merged; the others (integers, booleans, empty ones) are copied."""
        return [name for name, spec in self.specs.items() if spec.dtype.is_floating_point and spec.num_bytes]

    @cached_property
    def positions(self) -> dict[str, int]:
        """Where each merged tensor begins when all of them lie one behind the other."""
        sizes = [self.specs[name].num_elements for name in self.merged_names]
        return dict(zip(self.merged_names, accumulate(sizes, initial=0), strict=False))

    @cached_property
    def depths(self) -> dict[str, float]:
        """How deep in its stack of layers each merged tensor lies, from 0 to 1."""
        return depths_of(self.merged_names)

    def parameters_at(self, name: str) -> dict[str, Any]:
        """What the method's function gets for one tensor: numbers, lists with one for each target, words."""
        options = options_of(self.method)
        return {
            key: value_at(value, name, self.depths[name])
            for key, value in self.parameters.items()
            if not options[key].measures
        }

    @property
    def written_parameters(self) -> dict[str, object]:
        """The parameters for a record in JSON."""
        return {key: written(value) for key, value in self.parameters.items()}

    @cached_property
    def num_elements(self) -> int:
        """Elements that are merged."""
        return sum(self.specs[name].num_elements for name in self.merged_names)

    @cached_property
    def merged_bytes(self) -> int:
        """Bytes of all tensors that are merged, in one model."""
        return sum(self.specs[name].num_bytes for name in self.merged_names)

    @cached_property
    def copied_names(self) -> list[str]:
        merged = set(self.merged_names)
        return [name for name in self.specs if name not in merged]


def make_plan(
    method: str,
    base: State | None,
    targets: Sequence[State],
    *,
    scale: float,
    seed: int,
    parameters: Mapping[str, object],
    evidence: Evidence | None = None,
) -> MergePlan:
    """Check everything that can be checked without computing.

    Raises:
        UserError: with all problems: unknown method or parameter, wrong value, inputs that do not fit together.
    """
    problems = request_problems(method, base is not None, len(targets), scale, seed, parameters, evidence)
    raise_problems(problems + state_problems(input_roles(base, targets)))
    loaded = load_method(method)
    plan = MergePlan(loaded, with_defaults(loaded, parameters), base, tuple(targets), float(scale), seed, evidence)
    raise_problems(_copied_problems(plan) + _varying_problems(plan))
    return plan


def request_problems(
    method: str,
    has_base: bool,
    num_targets: int,
    scale: float,
    seed: int,
    parameters: Mapping[str, object],
    evidence: Evidence | None,
) -> list[str]:
    """What is wrong with a request, whatever its inputs hold."""
    problems = []
    if num_targets < 1:
        problems.append("there is nothing to merge: give at least one target")
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        problems.append(f"scale must be a number, got {scale!r}")
    elif scale != 1 and not has_base:
        problems.append(f"scale {scale:g} multiplies the merged delta from a base, and there is no base: give one")
    if isinstance(seed, bool) or not isinstance(seed, int):
        problems.append(f"seed must be a whole number, got {seed!r}")
    try:
        loaded = load_method(method)
    except UserError as error:
        return problems + error.problems
    if loaded.needs_base and not has_base:
        problems.append(f"merge method '{loaded.name}' works on deltas from a base: give the base")
    if loaded.num_targets is not None and num_targets != loaded.num_targets:
        problems.append(f"merge method '{loaded.name}' takes exactly {loaded.num_targets} targets, got {num_targets}")
    problems += _evidence_problems(loaded, evidence, num_targets)
    return problems + check_parameters(loaded, parameters, num_targets=num_targets)


def _evidence_problems(method: MergeMethod[...], evidence: Evidence | None, num_targets: int) -> list[str]:
    wanted = method.evidence.__name__ if method.evidence else None
    if wanted and evidence is None:
        return [
            f"merge method '{method.name}' needs {wanted.replace('_', ' ')}, which are measured on dialogues: "
            "merge.py does it for targets with stage-1 runs; in Python give evidence=fusion.merging.measure(...)"
        ]
    if evidence is None:
        return []
    problems = []
    if evidence.kind != wanted:
        problems.append(f"merge method '{method.name}' takes {wanted or 'no'} evidence, got {evidence.kind}")
    if len(evidence.states) != num_targets:
        problems.append(f"evidence of {len(evidence.states)} targets is given, and {num_targets} targets")
    return problems


def _varying_problems(plan: MergePlan) -> list[str]:
    """Parameters that do not fit the model's tensors, or each other at some of them."""
    problems = []
    for parameter, value in plan.parameters.items():
        problems += varying_problems(parameter, value, plan.merged_names)
    if not problems:
        found = {
            problem: name for name in plan.merged_names for problem in plan.method.check(plan.parameters_at(name))
        }
        problems = [f"at '{name}': {problem}" for problem, name in found.items()]
    return [f"merge method '{plan.method.name}': {problem}" for problem in problems[:SHOWN]]


def specs_of(state: State) -> Specs:
    if isinstance(state, Checkpoint):
        return state.specs
    return {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}


def input_roles(base: Input | None, targets: Sequence[Input]) -> dict[str, Input]:
    """How problems call the inputs: `base`, `target 0`, `target 1`, ... in this order."""
    roles = {} if base is None else {"base": base}
    return roles | {f"target {j}": target for j, target in enumerate(targets)}


def input_labels(inputs: Mapping[str, State]) -> list[str]:
    """The roles of `inputs`, with their folders where they have one."""
    return [f"{role} ({state.folder})" if isinstance(state, Checkpoint) else role for role, state in inputs.items()]


def state_problems(inputs: Mapping[str, State]) -> list[str]:
    """Tensors by which the inputs, named by their roles, do not fit the first of them."""
    if not inputs:
        return []
    (first, *others), labels = inputs.values(), input_labels(inputs)
    reference = specs_of(first)
    problems = _quantized_problems(labels[0], reference)
    for label, state in zip(labels[1:], others, strict=True):
        problems += _fit_problems(labels[0], reference, label, specs_of(state))
    return problems


def _fit_problems(reference_label: str, reference: Specs, label: str, specs: Specs) -> list[str]:
    """Tensors of `specs` that are missing, extra, or differ in shape or dtype; the first few in full."""
    missing = [f"{label}: '{name}' of {reference_label} is missing" for name in reference if name not in specs]
    extra = [f"{label}: '{name}' is not in {reference_label}" for name in specs if name not in reference]
    different = [
        f"{label}: '{name}' is {specs[name]}, but {spec} in {reference_label}: {_advice(name, specs[name], spec)}"
        for name, spec in reference.items()
        if name in specs and specs[name] != spec
    ]
    problems = missing + extra + different
    hidden = len(problems) - SHOWN
    return [*problems[:SHOWN], f"{label}: and {hidden} more tensors that do not fit"] if hidden > 0 else problems


def _advice(name: str, spec: TensorSpec, reference: TensorSpec) -> str:
    """What to do about a tensor that differs in shape or dtype."""
    if LAYER.match(name) or spec.dtype != reference.dtype or spec.shape[1:] != reference.shape[1:]:
        return "save both models alike"
    return f"for another vocabulary, {CHOOSE}"


def _quantized_problems(label: str, specs: Specs) -> list[str]:
    dtypes = sorted(
        {str(spec.dtype) for spec in specs.values() if spec.dtype.is_floating_point} - set(map(str, MERGEABLE))
    )
    return (
        [f"{label}: holds quantized tensors ({', '.join(dtypes)}): merge the models in 16 bits or more"]
        if dtypes
        else []
    )


def _copied_problems(plan: MergePlan) -> list[str]:
    labels = input_labels(plan.inputs)
    return [
        f"{label}: '{name}' is not a float tensor, so it is copied and not merged, but it differs from {labels[0]}"
        for label, state in zip(labels, plan.inputs.values(), strict=True)
        for name in plan.copied_names
        if not torch.equal(state[name], plan.reference[name])
    ]
