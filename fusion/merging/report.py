"""What a merge did: for `result.json`, the logger and the comparison page."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field


@dataclass
class MergeReport:
    """Coefficients, norms and costs of one merge; targets are in the order in which they were given.

    `coefficients`: tensor name -> weight of each target. `mean_coefficients`: their mean over all elements of the
    model. `delta_norms`: L2 norm of each target's whole delta (of its weights when there is no base). `events`: what
    happened -> names of the tensors where it did. `bytes_read` counts tensors each time they are read.
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
    events: dict[str, list[str]] = field(default_factory=dict)
    bytes_read: int = 0
    bytes_written: int = 0
    seconds: float = 0.0

    def add(
        self, name: str, size: int, coefficients: list[float], norms: list[float], events: Sequence[str] = ()
    ) -> None:
        """Enter one merged tensor of `size` elements."""
        self.num_elements += size
        share = size / self.num_elements
        means = self.mean_coefficients or [0.0] * self.num_targets
        self.mean_coefficients = [
            mean + share * (coefficient - mean) for mean, coefficient in zip(means, coefficients, strict=True)
        ]
        totals = self.delta_norms or [0.0] * self.num_targets
        self.delta_norms = [math.hypot(total, norm) for total, norm in zip(totals, norms, strict=True)]
        self.coefficients[name] = coefficients
        for event in events:
            self.events.setdefault(event, []).append(name)

    def to_dict(self) -> dict[str, object]:
        return asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)
