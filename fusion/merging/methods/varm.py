import re
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from fusion.merging.arithmetic import UNIFORM, shares, squared_norms, sum_over_targets, weighted_sum
from fusion.merging.method import MergedDelta, Parameters, Statistic, TensorContext, merge_method

Unit = Literal["matrix", "layer", "model", "parameter"]
LAYER = re.compile(r"(?:.*?\.)?\d+(?=\.)")


@cache
def layer_of(name: str) -> str:
    """`model.layers.7` of `model.layers.7.mlp.up_proj.weight`; a tensor outside every numbered layer is its own."""
    layer = LAYER.match(name)
    return layer.group() if layer else name


def _first_pass(parameters: Parameters) -> Statistic | None:
    return squared_norms if parameters["unit"] in ("layer", "model") else None


def _unit_energies(unit: Unit, context: TensorContext) -> Tensor:
    members = [
        energies_J
        for name, energies_J in context.statistics.items()
        if unit == "model" or layer_of(name) == layer_of(context.name)
    ]
    return torch.stack(members).sum(dim=0)


def _per_parameter(deltas_JN: Tensor) -> MergedDelta:
    energies_JN = deltas_JN.square()
    total_N = sum_over_targets(energies_JN)
    shares_JN = torch.where(total_N == 0, 1 / len(deltas_JN), energies_JN / total_N)
    events = () if bool((total_N > 0).any()) else (UNIFORM,)
    mean_J = shares_JN.mean(dim=1, dtype=torch.float64)
    return MergedDelta(sum_over_targets(deltas_JN * shares_JN), mean_J, events)


@merge_method(paper="https://arxiv.org/abs/2402.16107", first_pass=_first_pass)
def varm(
    deltas_JN: Tensor,
    *,
    unit: Unit = "matrix",
    context: TensorContext = TensorContext(),  # noqa: B008 - frozen
) -> MergedDelta:
    """VaRM (FuseChat v1): average of the targets weighted by eta_j = sum d_j^2 / sum_i sum d_i^2 over a unit.

    The unit is the tensor (`matrix`), the numbered `layer` (a tensor outside of all is its own), the `model`, or
    every single `parameter` (the coefficients reported are then means over positions).
    """
    if unit == "parameter":
        return _per_parameter(deltas_JN)
    energies_J = squared_norms(deltas_JN) if unit == "matrix" else _unit_energies(unit, context)
    eta_J, events = shares(energies_J)
    return MergedDelta(weighted_sum(deltas_JN, eta_J), eta_J, events)
