"""What a merge did: for `result.json`, the logger and the comparison page."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from fusion.merging.plan import MergePlan
from fusion.merging.statistics import TensorRecord


@dataclass
class MergeReport:
    """Coefficients, deltas and costs of one merge; targets are in the order in which they were given.

    `coefficients`: tensor name -> weight of each target. `mean_coefficients`: their mean over all elements of the
    model. `delta_norms`: L2 norm of each target's whole delta (of its weights when there is no base). `cosines`:
    between the targets' whole deltas, [J][J]. `sign_conflicts`: share of positions at which targets move in opposite
    directions. `shares`: what the method counted, such as the share of entries that were selected or erased. `events`:
    what happened -> names of the tensors where it did. `tensors`: tensor name -> elements, and of these alone norms,
    sign conflicts and shares.

    Cosines, conflicts and shares of tensors beyond a million elements are estimated from every eighth block.
    `evidence`: what was measured on dialogues for the method, and on how many.

    `bytes_read` counts every input once; `copy_speed` is that of a plain copy on the same disk, read and written bytes
    per second, as is `speed`. `resumed` tensors were there from an earlier attempt. `merged_together`: merges that
    shared the reading; `seconds` are of all of them together.
    """

    method: str
    parameters: dict[str, object]
    scale: float
    seed: int
    num_targets: int
    num_elements: int = 0
    coefficients: dict[str, list[float]] = field(default_factory=dict)
    mean_coefficients: list[float] = field(default_factory=list)
    delta_norms: list[float] = field(default_factory=list)
    cosines: list[list[float]] = field(default_factory=list)
    sign_conflicts: float = 0.0
    shares: dict[str, float] = field(default_factory=dict)
    events: dict[str, list[str]] = field(default_factory=dict)
    evidence: dict[str, object] = field(default_factory=dict)
    tensors: dict[str, dict[str, object]] = field(default_factory=dict)
    bytes_read: int = 0
    bytes_written: int = 0
    resumed: int = 0
    seconds: float = 0.0
    merged_together: int = 1
    copy_speed: float | None = None

    @classmethod
    def of(cls, plan: MergePlan, records: Sequence[TensorRecord]) -> "MergeReport":
        """Put the tensors, in the plan's order, together."""
        report = cls(plan.method.name, plan.written_parameters, plan.scale, plan.seed, len(plan.targets))
        report.evidence = dict(plan.evidence.summary) if plan.evidence else {}
        report.num_elements = sum(record.num_elements for record in records)
        report.coefficients = {record.name: record.coefficients for record in records}
        report.tensors = {record.name: _facts(record) for record in records}
        report.mean_coefficients = _mean_coefficients(records)
        report.delta_norms = [math.hypot(*norms) for norms in zip(*(record.norms for record in records), strict=True)]
        report.cosines = _cosines(records)
        report.shares = _shares(records)
        for record in records:
            report.sign_conflicts += record.conflicts * record.num_elements / report.num_elements
            for event in record.events:
                report.events.setdefault(event, []).append(record.name)
        return report

    @property
    def speed(self) -> float:
        """Bytes read and written per second; 0 when nothing was measured."""
        num_bytes = self.bytes_read + self.merged_together * self.bytes_written
        return num_bytes / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, object]:
        costs: dict[str, object] = {"speed": self.speed}
        if self.copy_speed:
            costs["share_of_copy_speed"] = self.speed / self.copy_speed
        return asdict(self) | costs

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)


def _facts(record: TensorRecord) -> dict[str, object]:
    return {
        "elements": record.num_elements,
        "norms": record.norms,
        "sign_conflicts": record.conflicts,
        "shares": _shares([record]),
    }


def _mean_coefficients(records: Sequence[TensorRecord]) -> list[float]:
    total, means = 0, [0.0] * (len(records[0].coefficients) if records else 0)
    for record in records:
        total += record.num_elements
        share = record.num_elements / total
        means = [mean + share * (one - mean) for mean, one in zip(means, record.coefficients, strict=True)]
    return means


def _cosines(records: Sequence[TensorRecord]) -> list[list[float]]:
    """1 on the diagonal, 0 where a target did not move."""
    products = [
        [math.fsum(cells) for cells in zip(*rows, strict=True)]
        for rows in zip(*(record.products for record in records), strict=True)
    ]
    lengths = [math.sqrt(row[j]) for j, row in enumerate(products)]
    return [
        [1.0 if i == j else cell / (lengths[i] * lengths[j] or 1.0) for j, cell in enumerate(row)]
        for i, row in enumerate(products)
    ]


def _shares(records: Sequence[TensorRecord]) -> dict[str, float]:
    totals: dict[str, tuple[float, float]] = {}
    for record in records:
        for name, (part, whole) in record.notes.items():
            parts, wholes = totals.get(name, (0.0, 0.0))
            totals[name] = parts + part, wholes + whole
    return {name: part / whole if whole else 0.0 for name, (part, whole) in totals.items()}
