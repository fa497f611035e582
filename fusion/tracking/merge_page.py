"""What one merge did, on a page that needs no network: `merge.html` beside the job's `result.json`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import hypot
from pathlib import Path
from typing import Any, NamedTuple

from fusion.cache import write_text
from fusion.merging.layers import layer_of
from fusion.tracking.page import render

PAGE = "merge.html"
TEMPLATE = "merge.html.j2"


class Layer(NamedTuple):
    """Tensors of one layer together; a tensor outside every numbered layer is its own."""

    name: str
    elements: int
    coefficients: list[float]
    """Of every target: mean over the elements."""
    norms: list[float]
    """Of every target's delta."""
    sign_conflicts: float


class Tensor(NamedTuple):
    name: str
    elements: int
    coefficients: Sequence[float]
    norms: Sequence[float]
    sign_conflicts: float
    shares: Mapping[str, float]
    events: list[str]


@dataclass(frozen=True)
class MergeView:
    """`MergeReport.to_dict` and the targets' names, in the order of the merge, as the page shows them."""

    report: Mapping[str, Any]
    targets: Sequence[str]

    @cached_property
    def tensors(self) -> list[Tensor]:
        events = self.report["events"]
        return [
            Tensor(
                name,
                facts["elements"],
                self.report["coefficients"][name],
                facts["norms"],
                facts["sign_conflicts"],
                facts["shares"],
                [event for event, names in events.items() if name in names],
            )
            for name, facts in self.report["tensors"].items()
        ]

    @cached_property
    def layers(self) -> list[Layer]:
        by_layer: dict[str, list[Tensor]] = {}
        for tensor in self.tensors:
            by_layer.setdefault(layer_of(tensor.name), []).append(tensor)
        return [_layer(name, tensors) for name, tensors in by_layer.items()]

    @cached_property
    def stacks(self) -> dict[str, "Stack"]:
        """Numbered layers whose tensors have the same names, such as all decoder layers of a model."""
        stacks: dict[str, dict[tuple[str, int], Tensor]] = {}
        for tensor in self.tensors:
            layer = layer_of(tensor.name)
            stack, _, number = layer.rpartition(".")
            if layer != tensor.name and number.isdigit():
                stacks.setdefault(stack, {})[tensor.name[len(layer) + 1 :], int(number)] = tensor
        return {name: Stack(cells) for name, cells in stacks.items()}

    @property
    def largest(self) -> float:
        """Largest coefficient of a tensor, by its size: where colours are strongest."""
        return max((abs(value) for tensor in self.tensors for value in tensor.coefficients), default=0.0) or 1.0

    @property
    def share_names(self) -> list[str]:
        return list(self.report["shares"])


@dataclass(frozen=True)
class Stack:
    cells: Mapping[tuple[str, int], Tensor]
    """By name within the layer, and number of the layer."""

    @property
    def roles(self) -> list[str]:
        return list(dict.fromkeys(role for role, _ in self.cells))

    @property
    def numbers(self) -> list[int]:
        return sorted({number for _, number in self.cells})

    def __iter__(self) -> Iterator[tuple[int, int, Tensor]]:
        """Column (layer), row (role) and tensor of every cell."""
        columns = {number: column for column, number in enumerate(self.numbers)}
        rows = {role: row for row, role in enumerate(self.roles)}
        for (role, number), tensor in self.cells.items():
            yield columns[number], rows[role], tensor


def write_merge_page(folder: Path, report: Mapping[str, Any], targets: Sequence[str], command: str) -> Path:
    """Write `merge.html` into `folder`; equal reports give equal bytes."""
    path = folder / PAGE
    title = f"{report['method']} of {', '.join(targets)}"
    write_text(path, render(TEMPLATE, title=title, merge=MergeView(report, targets), report=report, command=command))
    return path


def _layer(name: str, tensors: Sequence[Tensor]) -> Layer:
    elements = sum(tensor.elements for tensor in tensors)
    shares = [tensor.elements / elements for tensor in tensors]
    coefficients = _weighted(shares, [tensor.coefficients for tensor in tensors])
    norms = [hypot(*of_target) for of_target in zip(*(tensor.norms for tensor in tensors), strict=True)]
    (conflicts,) = _weighted(shares, [[tensor.sign_conflicts] for tensor in tensors])
    return Layer(name, elements, coefficients, norms, conflicts)


def _weighted(shares: Sequence[float], rows: Sequence[Sequence[float]]) -> list[float]:
    return [
        sum(share * value for share, value in zip(shares, column, strict=True)) for column in zip(*rows, strict=True)
    ]
