"""Merges of what is in memory, or into memory: merged = base + scale * delta."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusion.config.schema import EngineConfig
from fusion.merging.evidence import Evidence
from fusion.merging.merger import Merge, merge_together
from fusion.merging.numerics.rounding import scaled_sum
from fusion.merging.plan import MergePlan, MergeRequest, State
from fusion.merging.report import MergeReport
from fusion.merging.resources import checked_resources
from fusion.merging.statistics import TensorRecord


@dataclass(frozen=True)
class Held:
    """Merged tensors in memory, or the unscaled deltas when `scale` is None."""

    scale: float | None
    tensors: dict[str, Tensor]

    @classmethod
    def of(cls, plan: MergePlan, scale: float | None) -> "Held":
        dtypes = {name: torch.float32 if scale is None else plan.specs[name].dtype for name in plan.merged_names}
        return cls(scale, {name: torch.empty(plan.specs[name].shape, dtype=dtype) for name, dtype in dtypes.items()})

    def write(self, name: str, start: int, values_N: Tensor) -> None:
        self.tensors[name].view(-1)[start : start + len(values_N)] = values_N


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
    plan = MergeRequest(method, parameters, scale, seed, evidence).plan(base, targets)
    held = Held.of(plan, plan.scale)
    for _ in merge_together([Merge(plan, held)], checked_resources(plan, engine)):
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
    request = MergeRequest(method, parameters, seed=seed, evidence=evidence)
    return merge_deltas_together([request], base, targets, engine=engine)[0]


def merge_deltas_together(
    requests: Sequence[MergeRequest],
    base: State | None,
    targets: Sequence[State],
    *,
    engine: EngineConfig = EngineConfig(),  # noqa: B008 - frozen
) -> list[MergedDeltas]:
    """The same for several requests, whatever their scales: the inputs are read once, the deltas of all are held.

    Raises:
        UserError: as `merge_state_dicts`.
    """
    started = time.perf_counter()
    plans = [request.plan(base, targets) for request in requests]
    held = [Held.of(plan, None) for plan in plans]
    merges = [Merge(plan, sink) for plan, sink in zip(plans, held, strict=True)]
    records: dict[Merge, list[TensorRecord]] = {merge: [] for merge in merges}
    for plan in plans:
        resources = checked_resources(plan, engine)
    for merge, record in merge_together(merges, resources):
        records[merge].append(record)
    reports = [MergeReport.of(merge.plan, records[merge]) for merge in merges]
    for report in reports:
        report.bytes_read = plans[0].merged_bytes * len(plans[0].inputs)
        report.seconds, report.merged_together = time.perf_counter() - started, len(merges)
    return [MergedDeltas(*parts) for parts in zip(plans, (sink.tensors for sink in held), reports, strict=True)]
