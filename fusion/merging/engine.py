"""The merge itself, one tensor at a time: merged = base + scale * delta.

Deltas are float32; the sum is rounded once, to the dtype of the input. Shapes: J targets, N elements of a tensor.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusion.config import UserError, raise_problems
from fusion.merging.arithmetic import squared_norms
from fusion.merging.method import TensorContext, check_result
from fusion.merging.parameters import wants_context
from fusion.merging.plan import MergePlan, State, input_labels, make_plan
from fusion.merging.report import MergeReport


@dataclass(frozen=True)
class MergedTensor:
    """`origin` (the base's tensor, or None) and the unscaled float32 `delta` of one name, in the tensor's shape."""

    name: str
    origin: Tensor | None
    delta: Tensor
    dtype: torch.dtype

    def at_scale(self, scale: float) -> Tensor:
        """base + scale * delta in `dtype`, rounded once.

        Raises:
            UserError: the result overflows the dtype.
        """
        merged = self.delta.to(_wide_dtype(self.dtype)) * scale
        if self.origin is not None:
            merged += self.origin.to(merged.dtype)
        rounded = merged.to(self.dtype)
        if not bool(torch.isfinite(rounded).all()):
            raise UserError(f"'{self.name}' overflows {self.dtype} at scale {scale:g}: choose a smaller scale")
        return rounded


@dataclass(frozen=True)
class MergedDeltas:
    """A merge whose scale is still open: `deltas` are unscaled, float32, in the tensors' shapes."""

    plan: MergePlan
    deltas: Mapping[str, Tensor]
    report: MergeReport

    def at_scale(self, scale: float) -> dict[str, Tensor]:
        """The merged state dict base + scale * delta, copied tensors included, in the base's order."""
        plan, merged = self.plan, {}
        for name, spec in plan.specs.items():
            if name in self.deltas:
                origin = None if plan.base is None else plan.base[name].detach().cpu()
                merged[name] = MergedTensor(name, origin, self.deltas[name], spec.dtype).at_scale(scale)
            else:
                merged[name] = plan.reference[name].clone()
        return merged


def merge_state_dicts(
    method: str,
    base: State | None,
    targets: Sequence[State],
    *,
    scale: float = 1.0,
    seed: int = 0,
    **parameters: object,
) -> dict[str, Tensor]:
    """Merge state dicts on the CPU: base + scale * (the merged delta of the targets), in the base's dtypes.

    `method` is the name of a module in `fusion.merging.methods` or a dotted path to a function marked with
    `merge_method`; `parameters` are the function's own. Without a base (methods that allow it) deltas are taken from
    zero. Tensors that are not floats are copied and must be equal in all inputs.

    Raises:
        UserError: with all problems of the request and the inputs, or NaN and infinities in a tensor.
    """
    plan = make_plan(method, base, targets, scale=scale, seed=seed, parameters=parameters)
    merged = {tensor.name: tensor.at_scale(plan.scale) for tensor in merge_stream(plan, new_report(plan))}
    return {name: merged[name] if name in merged else plan.reference[name].clone() for name in plan.specs}


def merge_deltas(
    method: str, base: State | None, targets: Sequence[State], *, seed: int = 0, **parameters: object
) -> MergedDeltas:
    """As `merge_state_dicts`, but keep the merged delta apart, so that any scale costs only an addition."""
    started = time.perf_counter()
    plan = make_plan(method, base, targets, scale=1.0, seed=seed, parameters=parameters)
    report = new_report(plan)
    deltas = {tensor.name: tensor.delta for tensor in merge_stream(plan, report)}
    report.seconds = time.perf_counter() - started
    return MergedDeltas(plan, deltas, report)


def new_report(plan: MergePlan) -> MergeReport:
    return MergeReport(plan.method.name, dict(plan.parameters), plan.scale, plan.seed, len(plan.targets))


def merge_stream(plan: MergePlan, report: MergeReport) -> Iterator[MergedTensor]:
    """Merge tensor by tensor, holding one at a time, and enter each into `report`."""
    statistics = _first_pass(plan, report)
    for name in plan.merged_names:
        yield _merge_tensor(plan, name, statistics, report)


def _first_pass(plan: MergePlan, report: MergeReport) -> dict[str, Tensor]:
    statistic = plan.method.first_pass(plan.parameters)
    if statistic is None:
        return {}
    return {name: statistic(_read(plan, name, report)[1]) for name in plan.merged_names}


def _merge_tensor(plan: MergePlan, name: str, statistics: Mapping[str, Tensor], report: MergeReport) -> MergedTensor:
    origin, operands_JN = _read(plan, name, report)
    norms_J = squared_norms(operands_JN).sqrt()
    context = {"context": TensorContext(name, plan.seed, statistics)} if wants_context(plan.method) else {}
    merged = plan.method(operands_JN, **plan.parameters, **context)
    check_result(plan.method, merged, operands_JN)
    delta_N = merged.delta
    if origin is not None and plan.method.operands == "weights":
        delta_N = delta_N - _wide(origin)
    if not bool(torch.isfinite(squared_norms(delta_N[None])).all()):
        raise UserError(f"merge method '{plan.method.name}' made NaN or infinities of '{name}'")
    report.add(name, delta_N.numel(), merged.coefficients.tolist(), norms_J.tolist(), merged.events)
    spec = plan.specs[name]
    return MergedTensor(name, origin, delta_N.to(torch.float32).reshape(spec.shape), spec.dtype)


def _read(plan: MergePlan, name: str, report: MergeReport) -> tuple[Tensor | None, Tensor]:
    """The base's tensor, and what the method works on: deltas, or weights, float32 [J, N].

    Raises:
        UserError: an input holds NaN or infinities.
    """
    tensors = [state[name].detach().cpu() for state in plan.inputs.values()]
    report.bytes_read += sum(tensor.nbytes for tensor in tensors)
    problems = [
        f"{label}: '{name}' holds NaN or infinities: merging would spread them"
        for label, tensor in zip(input_labels(plan.inputs), tensors, strict=True)
        if not bool(torch.isfinite(squared_norms(_wide(tensor)[None])).all())
    ]
    raise_problems(problems)
    origin = None if plan.base is None else tensors.pop(0)
    subtracted_N = None if origin is None or plan.method.operands == "weights" else _wide(origin)
    operands_JN = torch.empty(len(tensors), tensors[0].numel(), dtype=torch.float32)
    for target, tensor in enumerate(tensors):
        operands_JN[target] = _wide(tensor) if subtracted_N is None else _wide(tensor) - subtracted_N
    return origin, operands_JN


def _wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _wide(tensor: Tensor) -> Tensor:
    """The tensor's elements [N], in float32 or better."""
    return tensor.to(_wide_dtype(tensor.dtype)).reshape(-1)
