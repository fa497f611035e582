"""The fusion-distillation objective around a copy of the pivot, as a LightningModule."""

import math
from collections.abc import Callable
from contextlib import nullcontext

import pytorch_lightning as pl
import torch
from pytorch_lightning.core.optimizer import LightningOptimizer
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor
from transformers import PreTrainedModel

from fusion.config.schema import ModelConfig, ObjectiveConfig, OptimConfig
from fusion.objective.target_form import TargetForm
from fusion.objective.target_loss import TargetLoss
from fusion.training.batches import OptimizerStep
from fusion.training.parallel import accumulating
from fusion.training.student import Student, load_student_model


class FusionModule(pl.LightningModule):
    """Trains a copy of the pivot on `ce_weight * CE(reference) + (1 - ce_weight) * D(fused target)`.

    D is the loss that belongs to the form of the targets (`fusion.objective.target_loss`); sft has no D.
    The loss is the mean over the supervised tokens of the whole optimiser step: sums of all micro-batches and devices
    over their common number of rows, not a mean of means. A batch of Lightning's is one optimiser step.
    """

    student: Student

    def __init__(
        self,
        pivot: ModelConfig,
        objective: ObjectiveConfig,
        optim: OptimConfig,
        total_steps: int,
        gradient_checkpointing: bool = False,
        form: TargetForm | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.pivot, self.objective, self.optim = pivot, objective, optim
        self.total_steps = total_steps
        self.gradient_checkpointing = gradient_checkpointing
        self.form = form or TargetForm()
        self.is_loaded = False

    @property
    def model(self) -> PreTrainedModel:
        return self.student.model

    def configure_model(self) -> None:
        """Load the pivot's weights; Lightning calls this more than once."""
        if self.is_loaded:
            return
        model = load_student_model(self.pivot)
        if self.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        self.student = Student(model, self.objective, self.form)
        self.is_loaded = True

    def training_step(self, step: OptimizerStep, number: int) -> None:
        optimizer, schedule = self._optimizer(), self.lr_schedulers()
        assert isinstance(schedule, torch.optim.lr_scheduler.LRScheduler)
        optimizer.zero_grad()
        # Devices average their gradients; the loss is a sum over all of them.
        scale = self.trainer.world_size / step.rows
        found: list[TargetLoss] = []
        for place, batch in enumerate(step.micro_batches, 1):
            is_last = place == len(step.micro_batches)
            with nullcontext() if is_last else accumulating(self.trainer.strategy, self.student):
                loss = self.student(batch)
                self.manual_backward(loss.loss * scale)
            found.append(TargetLoss(*(part.detach() for part in loss)))
        norm = torch.nn.utils.clip_grad_norm_(self.parameters(), self.optim.grad_clip or math.inf)
        optimizer.step()
        self._log_step(found, step.rows, norm)
        schedule.step()

    def _log_step(self, found: list[TargetLoss], rows: Tensor, norm: Tensor) -> None:
        parts = torch.stack([torch.stack(list(one)) for one in found]).sum(0)
        means = self.trainer.strategy.reduce(parts, reduce_op="sum") / rows
        rate = self._optimizer().param_groups[0]["lr"]
        values = dict(zip(TargetLoss._fields, means.unbind(), strict=True)) | {"lr": rate, "grad_norm": norm}
        self.log_dict({f"train/{name}": value for name, value in values.items()}, batch_size=1)

    def _optimizer(self) -> LightningOptimizer:
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        return optimizer

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
