"""Coefficients learned on dialogues. Tensor legend: J targets, L tensors of the model."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from fusion.cache import write_json
from fusion.config import UserError
from fusion.merging.checkpoint import Checkpoint, open_checkpoint
from fusion.merging.evidence import Evidence
from fusion.merging.measuring.study import Study, require_finite, tensor_parameters, total_nll
from fusion.merging.parameters import Between

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fusion.dialogues.encode import Encoded

STAGE = "learned_coefficients"
Count = Annotated[int, Between(1, 1_000_000)]
Rate = Annotated[float, Between(0, 10, above=True)]


def learned_coefficients(
    study: Study, *, start: float = 0.3, steps: Count = 60, rate: Rate = 0.02, batch: Count = 256
) -> Evidence:
    """One coefficient for each target and tensor, float64: `steps` steps of Adam from `start`.

    Minimises the nats per byte that the model base + sum_j c_j d_j needs for the study's dialogues, all targets'
    together; each step reads `batch` of them, drawn by the study's seed without putting back until all were read.
    By the chain rule the gradient by c_j is the product <gradient by the weight, d_j>, so a step costs one backward
    pass of one model. Tensors that are no parameters keep `start`.
    """
    if study.base is None:
        raise UserError("coefficients of deltas cannot be learned without a base: give the base")
    settings = {"start": start, "steps": steps, "rate": rate, "batch": batch, "seed": study.seed}
    folder = study.kept(
        STAGE,
        [study.base, *study.targets],
        study.all_dialogues,
        settings,
        lambda out: write_json(out / "coefficients.json", _learn(study, start, steps, rate, batch)),
    )
    found = json.loads((folder / "coefficients.json").read_text("utf-8"))
    states = tuple(
        {name: torch.tensor(row[j], dtype=torch.float64) for name, row in found["coefficients"].items()}
        for j in range(len(study.targets))
    )
    kind = learned_coefficients.__name__
    summary = {"kind": kind, "dialogues": len(study.all_dialogues), "nats_per_byte": found["nats_per_byte"]}
    return Evidence(kind, states, folder.name, summary)


def _learn(study: Study, start: float, steps: int, rate: float, batch: int) -> dict[str, object]:
    from fusion.teaching.causal_lm import has_plain_head

    assert study.base is not None
    model = study.model(study.base)
    merged = _Merged(tensor_parameters(model, study.base), study.base, study.targets)
    reader = _Reader(model, has_plain_head(model), study.batch_tokens)
    coefficients_LJ = torch.full((len(merged.parameters), len(study.targets)), start, dtype=torch.float64)
    adam = torch.optim.Adam([coefficients_LJ], lr=rate, foreach=False)
    losses = []
    for dialogues in _drawn(study.encoded(study.all_dialogues), batch, steps, study.seed):
        merged.set(coefficients_LJ)
        losses.append(reader.backward(dialogues))
        coefficients_LJ.grad = merged.gradient()
        adam.step()
        require_finite(coefficients_LJ.sum(), "the gradient of the loss", study.base)
    rows = dict(zip(merged.parameters, coefficients_LJ.tolist(), strict=True))
    others = [name for name in merged.base if name not in rows]
    return {"coefficients": rows | {name: [start] * len(study.targets) for name in others}, "nats_per_byte": losses}


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

    def __init__(self, parameters: Mapping[str, Parameter], base: Path, targets: Sequence[Path]) -> None:
        self.parameters = parameters
        self.base: Checkpoint = open_checkpoint(base)
        self._targets = [open_checkpoint(target) for target in targets]

    @torch.no_grad()
    def set(self, coefficients_LJ: Tensor) -> None:
        """Put base + sum_j c_j d_j into the model."""
        for (name, parameter), row in zip(self.parameters.items(), coefficients_LJ.tolist(), strict=True):
            weight = self.base[name].float()
            for coefficient, delta in zip(row, self._deltas(name), strict=True):
                weight += coefficient * delta
            parameter.copy_(weight)
            parameter.grad = None

    @torch.no_grad()
    def gradient(self) -> Tensor:
        """Of the loss by the coefficients, float64 [L, J], from the parameters' gradients."""
        rows = [
            [_product(parameter.grad, delta) for delta in self._deltas(name)]
            for name, parameter in self.parameters.items()
        ]
        return torch.tensor(rows, dtype=torch.float64)

    def _deltas(self, name: str) -> Iterator[Tensor]:
        origin = self.base[name].float()
        return (target[name].float() - origin for target in self._targets)


def _product(gradient: Tensor | None, delta: Tensor) -> float:
    if gradient is None:
        return 0.0
    return float((gradient.cpu().float() * delta).sum(dtype=torch.float64))


def _drawn(encoded: "Sequence[Encoded]", batch: int, steps: int, seed: int) -> "Iterator[list[Encoded]]":
    """The dialogues of each step, short ones first: all of them, or what is next in a new order for every round."""
    waiting: list[int] = []
    random = np.random.default_rng(seed)
    for _ in range(steps):
        if len(waiting) < min(batch, len(encoded)):
            waiting += random.permutation(len(encoded)).tolist()
        chosen, waiting = waiting[:batch], waiting[batch:]
        yield [encoded[place] for place in sorted(chosen)]
