"""The copy of the pivot that learns, with its loss inside its forward pass.

Whatever wraps the model (DDP, FSDP2, activation checkpointing) sees every use of its weights, the head's too.
Tensor legend: B dialogues, T tokens, H hidden size, R supervised rows.
"""

import torch
from transformers import PreTrainedModel

from fusion.config import UserError
from fusion.config.schema import ModelConfig, ObjectiveConfig
from fusion.objective.divergence import Divergence
from fusion.objective.model_head import has_known_head, read_head
from fusion.objective.target_form import TargetForm
from fusion.objective.target_loss import TargetLoss, Targets, target_loss
from fusion.teaching.causal_lm import final_hidden, load_causal_lm
from fusion.training.batches import FusionBatch
from fusion.training.weights import StoredWeights, map_model


class Student(torch.nn.Module):
    """`forward` gives the loss of a micro-batch, summed over its supervised rows."""

    def __init__(self, model: PreTrainedModel, objective: ObjectiveConfig, form: TargetForm) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.form = form

    def forward(self, batch: FusionBatch) -> TargetLoss:
        hidden_BTH = final_hidden(self.model, batch.ids_BT, batch.mask_BT, batch.positions_BT)
        hidden_RH = hidden_BTH.flatten(0, 1)[batch.rows_R]
        head, objective = read_head(self.model), self.objective
        targets = Targets(batch.targets_RK, batch.weights_RK)
        chunk_rows = objective.chunk_rows or None
        if objective.name == "sft":
            references = Targets(*(column_RK[:, :1] for column_RK in targets))
            return target_loss(hidden_RH, head, references, TargetForm(), 1.0, chunk_rows)
        divergence = Divergence(objective.divergence, objective.temperature)
        return target_loss(hidden_RH, head, targets, self.form, objective.ce_weight, chunk_rows, divergence)


def load_student_model(pivot: ModelConfig) -> PreTrainedModel:
    """The pivot's weights in float32, ready to train.

    Raises:
        UserError: the model cannot be loaded, or does to its logits what the objective does not support.
    """
    model = load_causal_lm(pivot, dtype="float32")
    _check_head(pivot, model)
    return model.train()


def map_student_model(pivot: ModelConfig) -> tuple[PreTrainedModel, StoredWeights]:
    """The same, but for its weights, which take no memory before they are filled in; raises the same."""
    model, mapped, weights = map_model(pivot)
    _check_head(pivot, mapped)
    return model.train(), weights


def _check_head(pivot: ModelConfig, model: PreTrainedModel) -> None:
    if not has_known_head(model):
        raise UserError(
            f"pivot {pivot.name}: {type(model).__name__} does more to its logits than the objective reads off its "
            "config (a scale, a soft cap); choose another pivot"
        )
