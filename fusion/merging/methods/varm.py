from typing import Literal

import torch
from torch import Tensor

from fusion.merging.deltas import Block, ModelDeltas, TensorDeltas
from fusion.merging.layers import layer_of
from fusion.merging.method import MergedDelta, Parameters, merge_method
from fusion.merging.numerics.arithmetic import UNIFORM, shares, squared_norms, sum_over_targets

Unit = Literal["matrix", "layer", "model", "parameter"]
Energies = dict[str, Tensor]


def _energies(deltas: TensorDeltas) -> Tensor:
    return deltas.reduce(lambda block: squared_norms(block.deltas_JN))


def _unit_of(name: str, unit: object) -> str:
    return "" if unit == "model" else layer_of(name)


def _energies_by_unit(model: ModelDeltas, parameters: Parameters) -> Energies:
    """Energies [J] of all layers, or of the model, where the coefficients need them."""
    by_unit: Energies = {}
    if parameters["unit"] in ("layer", "model"):
        for name, energies_J in model.per_tensor(_energies).items():
            unit = _unit_of(name, parameters["unit"])
            by_unit[unit] = by_unit[unit] + energies_J if unit in by_unit else energies_J
    return by_unit


def _per_parameter(deltas: TensorDeltas) -> MergedDelta:
    def shares_of(block: Block) -> Tensor:
        energies_JN = block.deltas_JN.square()
        total_N = sum_over_targets(energies_JN)
        return torch.where(total_N == 0, 1 / len(energies_JN), energies_JN / total_N)

    mean_J = deltas.reduce(lambda block: shares_of(block).sum(dim=1, dtype=torch.float64).cpu()) / deltas.num_elements
    moved = any(deltas.map(lambda block: bool(block.deltas_JN.any())))
    events = () if moved else (UNIFORM,)
    return MergedDelta(lambda block: sum_over_targets(block.deltas_JN * shares_of(block)), mean_J, events)


@merge_method(paper="https://arxiv.org/abs/2402.16107", survey=_energies_by_unit)
def varm(deltas: TensorDeltas, *, unit: Unit = "matrix") -> MergedDelta:
    """VaRM (FuseChat v1): average of the targets weighted by eta_j = sum d_j^2 / sum_i sum d_i^2 over a unit.

    The unit is the tensor (`matrix`), the numbered `layer` (a tensor outside of all is its own), the `model`, or
    every single `parameter` (the coefficients reported are then means over positions).
    """
    if unit == "parameter":
        return _per_parameter(deltas)
    survey = deltas.survey
    energies_J = survey[_unit_of(deltas.name, unit)] if isinstance(survey, dict) and survey else _energies(deltas)
    eta_J, events = shares(energies_J)
    return MergedDelta.weighted(eta_J, events)
