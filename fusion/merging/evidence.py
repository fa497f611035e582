"""What was measured on dialogues, as methods see it: squared gradients, products of inputs, learned coefficients.

`fusion.merging.measuring` measures it; the merge itself only reads. Shapes: J targets, N elements of a block.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fusion.config import UserError
from fusion.merging.checkpoints.checkpoint import Checkpoint
from fusion.merging.deltas import Block


@dataclass(frozen=True)
class Evidence:
    """One mapping from tensor names to what was measured there for each target, in the order of the targets."""

    kind: str
    """Name of the function that measured it; a method takes one kind."""
    states: tuple[Mapping[str, Tensor], ...]
    """In memory, or files that are read block by block (`open_checkpoint`)."""
    name: str
    """Names its content: merges with other evidence do not go on with each other's tensors."""
    summary: Mapping[str, object] = field(default_factory=dict)
    """For the report."""
    beside: "Evidence | None" = None
    """What else was measured, where a method weighs by evidence of two kinds."""

    def of(self, tensor: str) -> "TensorEvidence":
        return TensorEvidence(tensor, self.states, self.beside.of(tensor) if self.beside else None)


@dataclass(frozen=True)
class TensorEvidence:
    """What was measured of one tensor."""

    tensor: str
    states: Sequence[Mapping[str, Tensor]]
    beside: "TensorEvidence | None" = None

    def __bool__(self) -> bool:
        """Whether there is something of every target."""
        return all(self.tensor in state for state in self.states)

    def require(self, shape: Sequence[int]) -> None:
        """Raises `UserError` when what was measured has another shape."""
        shapes = [_shape(state, self.tensor) for state in self.states]
        if any(one != tuple(shape) for one in shapes):
            raise UserError(
                f"evidence of '{self.tensor}' must have the shape {list(shape)}, got "
                f"{', '.join(str(list(one)) for one in shapes)}: measure it on these targets"
            )

    def block(self, block: Block) -> Tensor:
        """float32 [J, N] beside the deltas of a block; for evidence of the tensor's own shape."""
        stop = block.start + block.num_elements
        return torch.stack([read_span(state, self.tensor, block.start, stop) for state in self.states]).to(
            block.deltas_JN
        )

    def whole(self, shape: Sequence[int]) -> list[Tensor]:
        """All of it, a tensor of this shape for each target.

        Raises:
            UserError: the evidence is of another shape.
        """
        self.require(shape)
        return [state[self.tensor] for state in self.states]


def _shape(state: Mapping[str, Tensor], tensor: str) -> tuple[int, ...]:
    return state.homes[tensor].specs[tensor].shape if isinstance(state, Checkpoint) else tuple(state[tensor].shape)


def read_span(state: Mapping[str, Tensor], tensor: str, start: int, stop: int) -> Tensor:
    """float32 elements from `start` to before `stop`."""
    if not isinstance(state, Checkpoint):
        return state[tensor].reshape(-1)[start:stop].to(torch.float32)
    file = state.homes[tensor]
    elements_N = torch.empty(stop - start, dtype=file.specs[tensor].dtype)
    file.read_span(tensor, start, elements_N)
    return elements_N.to(torch.float32)
