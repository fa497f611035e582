"""Coefficients learned on dialogues. Shapes: J targets, L tensors of the model, N elements of a block."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from fusion.cache import write_json
from fusion.config import UserError
from fusion.merging.checkpoints.checkpoint import Checkpoint, open_checkpoint
from fusion.merging.deltas import Block, block_length
from fusion.merging.evidence import Evidence, read_span
from fusion.merging.measuring.study import Study, require_finite, tensor_parameters, total_nll
from fusion.merging.parameters import Between

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fusion.dialogues.encode import Encoded

STAGE = "learned_coefficients"
Count = Annotated[int, Between(1, 1_000_000)]
Rate = Annotated[float, Between(0, 10, above=True)]


@dataclass(frozen=True)
class Learning:
    """`steps` of Adam at `rate` from `start`, each on `batch` dialogues."""

    start: float
    steps: int
    rate: float
    batch: int


Parts = Callable[[str, Block], Tensor]
"""What the coefficients of a tensor multiply in one of its blocks, float32 [J, N]."""


def learned_coefficients(
    study: Study, *, start: float = 0.3, steps: Count = 60, rate: Rate = 0.02, batch: Count = 256
) -> Evidence:
    """One coefficient for each target and tensor, float64: `steps` steps of Adam from `start`.

    Minimises the nats per byte that the model base + sum_j c_j d_j needs for the study's dialogues, all targets'
    together; each step reads `batch` of them, drawn by the study's seed without putting back until all were read.
    By the chain rule the gradient by c_j is the product <gradient by the weight, d_j>, so a step costs one backward
    pass of one model. Tensors that are no parameters keep `start`.
    """
    return kept_coefficients(study, Learning(start, steps, rate, batch), lambda tensor, block: block.deltas_JN)


def kept_coefficients(study: Study, learning: Learning, parts: Parts, parts_name: str = "deltas") -> Evidence:
    """Coefficients of what `parts` makes of the deltas, learned once; the cache knows it as `parts_name`."""
    if study.base is None:
        raise UserError("coefficients of deltas cannot be learned without a base: give the base")
    settings = {**asdict(learning), "seed": study.seed, "parts": parts_name}
    folder = study.kept(
        STAGE,
        [study.base, *study.targets],
        study.all_dialogues,
        settings,
        lambda out: write_json(out / "coefficients.json", _learn(study, learning, parts)),
    )
    found = json.loads((folder / "coefficients.json").read_text("utf-8"))
    states = tuple(
        {name: torch.tensor(row[j], dtype=torch.float64) for name, row in found["coefficients"].items()}
        for j in range(len(study.targets))
    )
    kind = learned_coefficients.__name__
    summary = {"kind": kind, "dialogues": len(study.all_dialogues), "nats_per_byte": found["nats_per_byte"]}
    return Evidence(kind, states, folder.name, summary)


def _learn(study: Study, learning: Learning, parts: Parts) -> dict[str, object]:
    from fusion.teaching.causal_lm import has_plain_head

    assert study.base is not None
    model = study.model(study.base)
    merged = _Merged(tensor_parameters(model, study.base), study.base, study.targets, parts)
    reader = _Reader(model, has_plain_head(model), study.batch_tokens)
    start_J = [learning.start] * len(study.targets)
    coefficients_LJ = torch.tensor([start_J] * len(merged.parameters), dtype=torch.float64)
    adam = torch.optim.Adam([coefficients_LJ], lr=learning.rate, foreach=False)
    losses = []
    for dialogues in _drawn(study.encoded(study.all_dialogues), learning.batch, learning.steps, study.seed):
        merged.set(coefficients_LJ)
        losses.append(reader.backward(dialogues))
        coefficients_LJ.grad = merged.gradient()
        adam.step()
        require_finite(coefficients_LJ.sum(), "the gradient of the loss", study.base)
    rows = dict(zip(merged.parameters, coefficients_LJ.tolist(), strict=True))
    others = {name: start_J for name in merged.base if name not in rows}
    return {"coefficients": rows | others, "nats_per_byte": losses}


@dataclass(frozen=True)
class _Reader:
    model: "PreTrainedModel"
    plain_head: bool
    batch_tokens: int

    def backward(self, dialogues: "Sequence[Encoded]") -> float:
        """Add the gradient of the nats per byte of these dialogues to the parameters' `grad`; return that loss."""
        from fusion.teaching.forward import token_batches

        num_bytes = sum(one.num_bytes for one in dialogues)
        loss = 0.0
        for places in token_batches([len(one.ids_N) for one in dialogues], self.batch_tokens):
            nats = total_nll(self.model, [dialogues[place] for place in places], self.plain_head) / num_bytes
            nats.backward()
            loss += float(nats.detach())
        return loss


class _Merged:
    """The parameters of a model as a function of coefficients; weights are read from the files at every step."""

    def __init__(self, parameters: Mapping[str, Parameter], base: Path, targets: Sequence[Path], parts: Parts) -> None:
        self.parameters = parameters
        self.base: Checkpoint = open_checkpoint(base)
        self._targets = [open_checkpoint(target) for target in targets]
        self._parts = parts

    @torch.no_grad()
    def set(self, coefficients_LJ: Tensor) -> None:
        """Put base + sum_j c_j p_j into the model."""
        for (name, parameter), row in zip(self.parameters.items(), coefficients_LJ.tolist(), strict=True):
            weight = torch.empty(parameter.shape, dtype=torch.float32)
            for span, origin_N, parts_JN in self._blocks(name):
                for coefficient, part_N in zip(row, parts_JN, strict=True):
                    origin_N += coefficient * part_N
                weight.view(-1)[span] = origin_N
            parameter.copy_(weight)
            parameter.grad = None

    @torch.no_grad()
    def gradient(self) -> Tensor:
        """Of the loss by the coefficients, float64 [L, J], from the parameters' gradients."""
        return torch.stack([self._products(name, parameter.grad) for name, parameter in self.parameters.items()])

    def _products(self, name: str, gradient: Tensor | None) -> Tensor:
        """<gradient, p_j>, float64 [J]."""
        sums_J = torch.zeros(len(self._targets), dtype=torch.float64)
        if gradient is not None:
            flat = gradient.cpu().float().flatten()
            for span, _, parts_JN in self._blocks(name):
                sums_J += (flat[span] * parts_JN).sum(dim=1, dtype=torch.float64)
        return sums_J

    def _blocks(self, name: str) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Which elements of a tensor, the base's [N], and the targets' parts p_j, [J, N], float32."""
        shape = self.base.specs[name].shape
        num_elements, length = math.prod(shape), block_length(shape)
        for start in range(0, num_elements, length):
            stop = min(start + length, num_elements)
            origin_N = read_span(self.base, name, start, stop)
            deltas_JN = torch.stack([read_span(target, name, start, stop) - origin_N for target in self._targets])
            row_length = shape[-1] if shape else 1
            yield slice(start, stop), origin_N, self._parts(name, Block(deltas_JN, start, start, row_length))


def _drawn(encoded: "Sequence[Encoded]", batch: int, steps: int, seed: int) -> "Iterator[list[Encoded]]":
    """The dialogues of each step, short ones first: all of them, or what is next in a new order for every round."""
    waiting: list[int] = []
    random = np.random.default_rng(seed)
    for _ in range(steps):
        if len(waiting) < min(batch, len(encoded)):
            waiting += random.permutation(len(encoded)).tolist()
        chosen, waiting = waiting[:batch], waiting[batch:]
        yield [encoded[place] for place in sorted(chosen)]
