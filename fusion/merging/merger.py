"""Merges of the same inputs, carried out together: tensor by tensor, block by block, each block read once for all.

Deltas are float32 (unless a method wants them unwidened); the sum is rounded once, to the dtype of the input.
Shapes: J targets, N elements of a block.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from fusion.config import UserError
from fusion.merging.deltas import Block, Counts, ModelDeltas, PerTensor, Run, TensorDeltas
from fusion.merging.method import MergedDelta, check_result
from fusion.merging.numerics.arithmetic import is_finite
from fusion.merging.numerics.one_pass import OnePass
from fusion.merging.numerics.rounding import scaled_sum
from fusion.merging.numerics.unwidened import UnwidenedOperands
from fusion.merging.numerics.workspace import Workspace
from fusion.merging.operands import TensorInputs, TensorOperands
from fusion.merging.plan import MergePlan
from fusion.merging.resources import Resources
from fusion.merging.statistics import TensorRecord
from fusion.merging.workers import Workers

Result = TypeVar("Result")


class Sink(Protocol):
    """Where blocks of merged tensors go."""

    @property
    def scale(self) -> float | None:
        """Of the merged tensors that it wants; None: it wants the unscaled merged deltas, float32."""

    def write(self, name: str, start: int, values_N: Tensor) -> None:
        """Take the elements from `start` on, before the caller goes on. Called by several threads."""


@dataclass(eq=False)
class Merge:
    """One of the merges that share a pass. All have the same inputs, the same objects in the same order."""

    plan: MergePlan
    sink: Sink
    finished: Collection[str] = ()
    """Tensors that need not be merged any more."""
    survey: object = None
    """What the method's `survey` found."""

    def deltas(self, name: str, operands: TensorOperands, run: Run) -> TensorDeltas:
        plan = self.plan
        shape, position = plan.specs[name].shape, plan.positions[name]
        evidence = plan.evidence.of(name) if plan.evidence else None
        seen = UnwidenedOperands(operands, plan.specs[name].dtype) if plan.method.unwidened else operands
        return TensorDeltas(name, shape, len(plan.targets), seen, position, plan.seed, self.survey, evidence, run)

    def tensor(self, name: str, operands: TensorOperands, run: Run) -> TensorRecord:
        """Merge one tensor."""
        deltas = self.deltas(name, operands, run)
        merged = self.plan.method(deltas, **self.plan.parameters_at(name))

        def finish(start: int) -> dict[str, Counts]:
            values_N = self._in_one_pass(merged, operands, deltas.span(start))
            notes: dict[str, Counts] = {}
            if values_N is None:
                origin_N, operands_JN = deltas.operands.load(*deltas.span(start))
                block = deltas.block(start, operands_JN, notes if operands.watched(start) else None, origin_N)
                values_N = self._values(name, origin_N, self._delta(merged, block, origin_N))
            self.sink.write(name, start, values_N)
            return notes

        notes = run(finish, deltas.starts)
        blocks = [operands.statistics[start] for start in deltas.starts]
        return TensorRecord.of(name, blocks, merged.coefficients, notes, merged.events, deltas.num_elements)

    def _in_one_pass(self, merged: MergedDelta, operands: TensorOperands, span: tuple[int, int]) -> Tensor | None:
        """The merged elements, in the output's dtype; None where that takes the deltas, or a closer look at them."""
        if self.sink.scale is None or not isinstance(merged.delta, OnePass) or operands.watched(span[0]):
            return None
        return operands.merged(*span, merged.delta, self.sink.scale)

    def _values(self, name: str, origin_N: Tensor | None, delta_N: Tensor) -> Tensor:
        """What the sink wants of a block.

        Raises:
            UserError: it is not finite.
        """
        try:
            if self.sink.scale is not None:
                return scaled_sum(name, origin_N, delta_N, self.sink.scale, self.plan.specs[name].dtype)
        except UserError:
            if is_finite(delta_N):
                raise
        if not is_finite(delta_N):
            raise UserError(f"merge method '{self.plan.method.name}' made NaN or infinities of '{name}'")
        return delta_N

    def _delta(self, merged: MergedDelta, block: Block, origin_N: Tensor | None) -> Tensor:
        method = self.plan.method
        delta_N = merged.delta(block)
        check_result(method, delta_N, merged.coefficients, block.deltas_JN)
        if origin_N is not None and method.operands == "weights":
            delta_N = (delta_N - origin_N).to(torch.float32)
        return delta_N


def merge_together(merges: Sequence[Merge], resources: Resources) -> Iterator[tuple[Merge, TensorRecord]]:
    """Carry out all merges; a tensor's record comes once it is in the merge's sink, in the order of the plan.

    The inputs are read once for all merges together, where a tensor of all inputs fits half of the memory. What a
    method must know of the whole model before (its `survey`) costs a pass of its own.

    Raises:
        UserError: NaN or infinities, a result of the wrong shape, an overflow.
    """
    with Workers(resources.threads) as workers:
        yield from _Pass(merges, resources, workers).records()


class _Pass:
    def __init__(self, merges: Sequence[Merge], resources: Resources, workers: Workers) -> None:
        self._merges, self._resources, self._workers = merges, resources, workers
        self._plan = merges[0].plan
        """For what all plans have in common: the inputs."""
        self._workspace = Workspace()

    def records(self) -> Iterator[tuple[Merge, TensorRecord]]:
        names = [name for name in self._plan.merged_names if any(name not in one.finished for one in self._merges)]
        for merge in self._merges:
            if any(name not in merge.finished for name in names):
                model = ModelDeltas(len(self._plan.targets), self._plan.num_elements, self._per_tensor(merge))
                merge.survey = merge.plan.method.survey(model, merge.plan.parameters)
        for _, records in self._workers.each(names, self._is_alone, self._merge_tensor):
            yield from records

    def _per_tensor(self, merge: Merge) -> PerTensor:
        def per_tensor(function: Callable[[TensorDeltas], Result]) -> dict[str, Result]:
            def work(name: str, run: Run) -> Result:
                return function(merge.deltas(name, self._operands(merge, self._inputs(name)), run))

            return dict(self._workers.each(self._plan.merged_names, self._is_alone, work))

        return per_tensor

    def _merge_tensor(self, name: str, run: Run) -> list[tuple[Merge, TensorRecord]]:
        inputs = self._inputs(name)
        merges = [merge for merge in self._merges if name not in merge.finished]
        if len(merges) > 1:
            inputs.keep()
        return [(merge, merge.tensor(name, self._operands(merge, inputs), run)) for merge in merges]

    def _is_alone(self, name: str) -> bool:
        """Whether a tensor is so large that all threads should work on it together."""
        spec, num_targets = self._plan.specs[name], len(self._plan.targets)
        whole_bytes = max(merge.plan.method.whole_bytes(name, spec.shape, num_targets) for merge in self._merges)
        if whole_bytes > self._resources.memory // self._resources.threads:
            return True
        return not whole_bytes and len(self._plan.inputs) * spec.num_bytes > self._resources.kept_per_thread

    def _inputs(self, name: str) -> TensorInputs:
        keep = self._resources.kept_alone if self._is_alone(name) else self._resources.kept_per_thread
        return TensorInputs(self._plan, name, self._workspace, keep)

    def _operands(self, merge: Merge, inputs: TensorInputs) -> TensorOperands:
        return TensorOperands(merge.plan, inputs, self._workspace, self._resources.device)
