"""Coefficients of the parts of Fisher merging. Shapes: J targets, N elements of a block."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fusion.merging.deltas import Block
from fusion.merging.evidence import Evidence
from fusion.merging.measuring.coefficients import Count, Learning, Rate, kept_coefficients
from fusion.merging.measuring.fisher import squared_gradients
from fusion.merging.measuring.study import Study, Whose
from fusion.merging.numerics.fisher_shares import fisher_shares, inverse_means


def fisher_coefficients(
    study: Study,
    *,
    start: float = 1.0,
    steps: Count = 60,
    rate: Rate = 0.1,
    batch: Count = 256,
    dialogues: Whose = "own",
) -> Evidence:
    """Squared gradients of each target, and beside them one coefficient for each target and tensor.

    The coefficients are learned as `learned_coefficients` learns them, from the dialogues of all targets together,
    but multiply F_j d_j / sum_i F_i where those multiply d_j. `dialogues`: what F is measured on, as in
    `squared_gradients`.
    """
    gradients = squared_gradients(study, dialogues=dialogues)
    parts = _Parts.of(gradients)
    learned = kept_coefficients(study, Learning(start, steps, rate, batch), parts, gradients.name)
    summary = {**learned.summary, "kind": fisher_coefficients.__name__}
    return Evidence(fisher_coefficients.__name__, gradients.states, learned.name, summary, learned)


@dataclass(frozen=True)
class _Parts:
    gradients: Evidence
    factors_J: Tensor

    @classmethod
    def of(cls, gradients: Evidence) -> "_Parts":
        totals = [sum(float(state[name].sum(dtype=torch.float64)) for name in state) for state in gradients.states]
        return cls(gradients, inverse_means(torch.tensor(totals, dtype=torch.float64), 1))

    def __call__(self, tensor: str, block: Block) -> Tensor:
        """F_j d_j / sum_i F_i of a block of a tensor, float32 [J, N]."""
        evidence, equal_J = self.gradients.of(tensor), torch.full_like(self.factors_J, 1 / len(self.factors_J))
        if not evidence:
            return block.deltas_JN * equal_J[:, None].float()
        shares_JN, _ = fisher_shares(evidence.block(block), self.factors_J, equal_J)
        return (shares_JN * block.deltas_JN).float()
