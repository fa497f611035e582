"""The merge itself: merged = base + scale * delta, tensor by tensor, block by block, in bounded memory.

Deltas are float32; the sum is rounded once, to the dtype of the input. Shapes: J targets, N elements of a block.
"""

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from fusion.config import UserError, raise_problems
from fusion.config.schema import EngineConfig
from fusion.merging import kernels
from fusion.merging.arithmetic import on_cpu
from fusion.merging.deltas import Block, Counts, ModelDeltas, Run, TensorDeltas
from fusion.merging.evidence import Evidence
from fusion.merging.method import MergedDelta, check_result
from fusion.merging.operands import TensorOperands, Workspace, wide_dtype
from fusion.merging.plan import MergePlan, State, make_plan
from fusion.merging.report import MergeReport
from fusion.merging.resources import Resources, checked_resources
from fusion.merging.statistics import TensorRecord
from fusion.merging.workers import Workers

Result = TypeVar("Result")


class Sink(Protocol):
    """Where blocks of merged tensors go."""

    def write(self, name: str, start: int, origin_N: Tensor | None, delta_N: Tensor) -> None:
        """Take the elements from `start` on: the base's, and the unscaled merged delta. Called by several threads.

        Raises:
            UserError: the sum is not finite.
        """


@dataclass(frozen=True)
class Held(Sink):
    """Merged tensors in memory, or the unscaled deltas when `scale` is None."""

    scale: float | None
    tensors: dict[str, Tensor]

    @classmethod
    def of(cls, plan: MergePlan, scale: float | None) -> "Held":
        dtypes = {name: torch.float32 if scale is None else plan.specs[name].dtype for name in plan.merged_names}
        return cls(scale, {name: torch.empty(plan.specs[name].shape, dtype=dtype) for name, dtype in dtypes.items()})

    def write(self, name: str, start: int, origin_N: Tensor | None, delta_N: Tensor) -> None:
        tensor = self.tensors[name]
        if self.scale is None:
            raise_problems([] if is_finite(delta_N) else [f"'{name}': the merged delta is not finite"])
            values_N = delta_N
        else:
            values_N = scaled_sum(name, origin_N, delta_N, self.scale, tensor.dtype)
        tensor.view(-1)[start : start + len(values_N)] = values_N


def scaled_sum(name: str, origin_N: Tensor | None, delta_N: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """base + scale * delta in `dtype`, rounded once.

    Raises:
        UserError: the result overflows the dtype.
    """
    rounded_N = torch.empty(delta_N.shape, dtype=dtype, device=delta_N.device)
    if dtype == torch.bfloat16 and on_cpu(delta_N) and origin_N is not None:
        arrays = delta_N.reshape(-1).numpy(), origin_N.reshape(-1).float().numpy()
        finite = kernels.round_to_bfloat16(*arrays, scale, rounded_N.view(-1).view(torch.uint16).numpy())
    else:
        merged_N = delta_N.to(wide_dtype(dtype)) * scale
        if origin_N is not None:
            merged_N += origin_N.to(merged_N)
        finite = is_finite(rounded_N.copy_(merged_N))
    if not finite:
        raise UserError(f"'{name}' overflows {dtype} at scale {scale:g}: choose a smaller scale")
    return rounded_N


def is_finite(values_N: Tensor) -> bool:
    """Sums of squares are the quickest test; only they may overflow, so that a finite one proves it."""
    norm = torch.linalg.vector_norm(values_N, dtype=wide_dtype(values_N.dtype))
    return bool(torch.isfinite(norm)) or bool(torch.isfinite(values_N).all())


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
                merged[name] = scaled_sum(name, origin, self.deltas[name], scale, spec.dtype)
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
    evidence: Evidence | None = None,
    engine: EngineConfig = EngineConfig(),  # noqa: B008 - frozen
    **parameters: object,
) -> dict[str, Tensor]:
    """Merge state dicts on the CPU: base + scale * (the merged delta of the targets), in the base's dtypes.

    `method` is the name of a module in `fusion.merging.methods` or a dotted path to a function marked with
    `merge_method`; `parameters` are the function's own. Without a base (methods that allow it) deltas are taken from
    zero. Tensors that are not floats are copied and must be equal in all inputs. `evidence` is what `measure` gave,
    for methods that weigh by what was measured on dialogues.

    Raises:
        UserError: with all problems of the request and the inputs, or NaN and infinities in a tensor.
    """
    plan = make_plan(method, base, targets, scale=scale, seed=seed, parameters=parameters, evidence=evidence)
    held = Held.of(plan, plan.scale)
    for _ in merge_tensors(plan, checked_resources(plan, engine), held):
        pass
    return {name: held.tensors[name] if name in held.tensors else plan.reference[name].clone() for name in plan.specs}


def merge_deltas(
    method: str,
    base: State | None,
    targets: Sequence[State],
    *,
    seed: int = 0,
    evidence: Evidence | None = None,
    engine: EngineConfig = EngineConfig(),  # noqa: B008 - frozen
    **parameters: object,
) -> MergedDeltas:
    """As `merge_state_dicts`, but keep the merged delta apart, so that any scale costs only an addition."""
    started = time.perf_counter()
    plan = make_plan(method, base, targets, scale=1.0, seed=seed, parameters=parameters, evidence=evidence)
    held = Held.of(plan, None)
    records = list(merge_tensors(plan, checked_resources(plan, engine), held))
    report = MergeReport.of(plan, records)
    report.bytes_read = plan.merged_bytes * len(plan.inputs)
    report.seconds = time.perf_counter() - started
    return MergedDeltas(plan, held.tensors, report)


def merge_tensors(
    plan: MergePlan, resources: Resources, sink: Sink, finished: Collection[str] = ()
) -> Iterator[TensorRecord]:
    """Merge all tensors but the `finished` ones; their records come in the plan's order, each once it is in `sink`.

    Raises:
        UserError: NaN or infinities, a result of the wrong shape, an overflow.
    """
    with Workers(resources.threads) as workers:
        yield from TensorMerger(plan, resources, workers, sink).merge(finished)


class TensorMerger:
    """Carries out a plan on some workers."""

    def __init__(self, plan: MergePlan, resources: Resources, workers: Workers, sink: Sink) -> None:
        self._plan, self._resources, self._workers, self._sink = plan, resources, workers, sink
        self._workspace = Workspace()
        self._survey: object = None

    def merge(self, finished: Collection[str]) -> Iterator[TensorRecord]:
        plan = self._plan
        names = [name for name in plan.merged_names if name not in finished]
        if names:
            model = ModelDeltas(len(plan.targets), plan.num_elements, self._per_tensor)
            self._survey = plan.method.survey(model, plan.parameters)
        for _, record in self._workers.each(names, self._is_alone, self._merge_tensor):
            yield record

    def _per_tensor(self, function: Callable[[TensorDeltas], Result]) -> dict[str, Result]:
        def work(name: str, run: Run) -> Result:
            return function(self._deltas(name, self._operands(name), run))

        return dict(self._workers.each(self._plan.merged_names, self._is_alone, work))

    def _is_alone(self, name: str) -> bool:
        """Whether a tensor is so large that all threads should work on it together."""
        spec, num_targets = self._plan.specs[name], len(self._plan.targets)
        if whole_bytes := self._plan.method.whole_bytes(name, spec.shape, num_targets):
            return whole_bytes > self._resources.memory // self._resources.threads
        return len(self._plan.inputs) * spec.num_bytes > self._resources.kept_per_thread

    def _operands(self, name: str) -> TensorOperands:
        keep = self._resources.kept_alone if self._is_alone(name) else self._resources.kept_per_thread
        return TensorOperands(self._plan, name, self._workspace, self._resources.device, keep)

    def _deltas(self, name: str, operands: TensorOperands, run: Run) -> TensorDeltas:
        plan = self._plan
        shape, position = plan.specs[name].shape, plan.positions[name]
        evidence = plan.evidence.of(name) if plan.evidence else None
        return TensorDeltas(name, shape, len(plan.targets), operands, position, plan.seed, self._survey, evidence, run)

    def _merge_tensor(self, name: str, run: Run) -> TensorRecord:
        operands = self._operands(name)
        deltas = self._deltas(name, operands, run)
        merged = self._plan.method(deltas, **self._plan.parameters_at(name))

        def finish(start: int) -> dict[str, Counts]:
            notes: dict[str, Counts] = {}
            origin_N, operands_JN = operands.load(*deltas.span(start))
            block = deltas.block(start, operands_JN, notes if operands.watched(start) else None)
            delta_N = self._delta(merged, block, origin_N)
            try:
                self._sink.write(name, start, origin_N, delta_N)
            except UserError as error:
                if is_finite(delta_N):
                    raise
                method = self._plan.method.name
                raise UserError(f"merge method '{method}' made NaN or infinities of '{name}'") from error
            return notes

        notes = run(finish, deltas.starts)
        blocks = [operands.statistics[start] for start in deltas.starts]
        return TensorRecord.of(name, blocks, merged.coefficients, notes, merged.events, deltas.num_elements)

    def _delta(self, merged: MergedDelta, block: Block, origin_N: Tensor | None) -> Tensor:
        method = self._plan.method
        delta_N = merged.delta(block)
        check_result(method, delta_N, merged.coefficients, block.deltas_JN)
        if origin_N is not None and method.operands == "weights":
            delta_N = (delta_N - origin_N).to(torch.float32)
        return delta_N
