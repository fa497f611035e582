"""The fusion-distillation objective around a copy of the pivot, as a LightningModule."""

import math
from collections.abc import Callable

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor
from transformers import PreTrainedModel

from fusion.config import UserError
from fusion.config.schema import ModelConfig, ObjectiveConfig, OptimConfig
from fusion.objective.target_form import TargetForm
from fusion.objective.target_loss import Head, TargetLoss, Targets, target_loss
from fusion.teaching.causal_lm import final_hidden, has_plain_head, head, load_causal_lm
from fusion.training.data import FusionBatch


class FusionModule(pl.LightningModule):
    """Trains a copy of the pivot on `ce_weight * CE(reference) + (1 - ce_weight) * D(fused target)`.

    D is the loss that belongs to the form of the targets (`fusion.objective.target_loss`); sft has no D.

    The loss is the mean over the supervised tokens of the whole optimiser step: sums of all micro-batches and devices
    over their common number of rows, not a mean of means.
    """

    model: PreTrainedModel

    def __init__(
        self,
        pivot: ModelConfig,
        objective: ObjectiveConfig,
        optim: OptimConfig,
        total_steps: int,
        accumulation: int = 1,
        gradient_checkpointing: bool = False,
        form: TargetForm | None = None,
    ) -> None:
        super().__init__()
        self.pivot, self.objective, self.optim = pivot, objective, optim
        self.total_steps, self.accumulation = total_steps, accumulation
        self.gradient_checkpointing = gradient_checkpointing
        self.form = form or TargetForm()
        self.is_loaded = False

    def configure_model(self) -> None:
        """Load the pivot's weights; Lightning calls this more than once."""
        if self.is_loaded:
            return
        self.model = load_causal_lm(self.pivot, dtype="float32")
        if not has_plain_head(self.model):
            raise UserError(
                f"pivot {self.pivot.name}: its logits are scaled or capped after the head, which the sparse objective "
                "does not support; choose another pivot"
            )
        if self.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        self.model.train()
        self.is_loaded = True

    def training_step(self, batch: FusionBatch, batch_index: int) -> Tensor:
        hidden_RH = final_hidden(self.model, batch.ids_BT, batch.mask_BT).flatten(0, 1)[batch.rows_R]
        found = self._loss(hidden_RH, batch)
        self._log_parts(found, len(batch.rows_R))
        # Lightning divides by the micro-batches of a step, and averages gradients over devices: both are undone.
        return found.loss * (self.accumulation * self.trainer.world_size) / batch.step_rows

    def _loss(self, hidden_RH: Tensor, batch: FusionBatch) -> TargetLoss:
        output = head(self.model)
        outlet = Head(output.weight, output.bias)
        chunk_rows = self.objective.chunk_rows or None
        targets = Targets(batch.targets_RK, batch.weights_RK)
        if self.objective.name == "sft":
            references = Targets(*(column_RK[:, :1] for column_RK in targets))
            return target_loss(hidden_RH, outlet, references, TargetForm(), 1.0, chunk_rows)
        return target_loss(hidden_RH, outlet, targets, self.form, self.objective.ce_weight, chunk_rows)

    def _log_parts(self, found: TargetLoss, rows: int) -> None:
        parts = {
            "loss": found.loss.detach() / rows,
            "ce": found.ce / rows,
            "fusion": found.fusion / rows,
            "lr": self.optimizers().param_groups[0]["lr"],  # type: ignore[union-attr]
        }
        self.log_dict({f"train/{name}": value for name, value in parts.items()}, batch_size=rows)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
        others = [parameter for parameter in parameters if parameter.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": self.optim.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.optim.lr, betas=(self.optim.betas[0], self.optim.betas[1]))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate(self.optim, self.total_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def learning_rate(optim: OptimConfig, total_steps: int) -> Callable[[int], float]:
    """Factor on the peak rate at each step: a linear warm-up, then `optim.schedule` down to the final share."""
    warmup = max(1, round(optim.warmup_fraction * total_steps))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        fall = {"cosine": (1 + math.cos(math.pi * progress)) / 2, "linear": 1 - progress, "constant": 1.0}
        return optim.final_lr_fraction + (1 - optim.final_lr_fraction) * fall[optim.schedule]

    return factor
