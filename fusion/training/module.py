"""The fusion-distillation objective around a copy of the pivot, as a LightningModule."""

import math
from contextlib import nullcontext
from typing import NamedTuple

import pytorch_lightning as pl
import torch
from pytorch_lightning.core.optimizer import LightningOptimizer
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from fusion.config.schema import TrainConfig
from fusion.objective.target_form import TargetForm
from fusion.training.batches import OptimizerStep
from fusion.training.flops import ModelFlops
from fusion.training.lora import add_adapters
from fusion.training.parallel import accumulating, own_name, spread
from fusion.training.schedule import learning_rate
from fusion.training.student import Student, load_student_model, map_student_model


class StepOutcome(NamedTuple):
    """What one optimiser step found, float32 scalars over all devices; known before the weights change."""

    loss: Tensor
    """Mean over the supervised rows of the step, in nats, as the next two."""
    ce: Tensor
    fusion: Tensor
    grad_norm: Tensor
    """Of all gradients together, before they are clipped."""


class FusionModule(pl.LightningModule):
    """Trains a copy of the pivot on `ce_weight * CE(reference) + (1 - ce_weight) * D(fused target)`.

    D is the loss that belongs to the form of the targets (`fusion.objective.target_loss`); sft has no D.
    The loss is the mean over the supervised tokens of the whole optimiser step: sums of all micro-batches and devices
    over their common number of rows, not a mean of means. A batch of Lightning's is one optimiser step.
    """

    student: Student
    outcome: StepOutcome
    """Of the step in progress; callbacks read it in `on_before_optimizer_step`."""

    def __init__(self, config: TrainConfig, total_steps: int, form: TargetForm | None = None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.config, self.optim = config, config.optim
        self.total_steps = total_steps
        self.form = form or TargetForm()
        self.is_loaded = False
        self.step: OptimizerStep | None = None
        """The one in progress."""

    @property
    def model(self) -> PreTrainedModel:
        return self.student.model

    def configure_model(self) -> None:
        """Load the pivot's weights; Lightning calls this more than once."""
        if self.is_loaded:
            return
        config, weights = self.config, None
        if config.parallel.name == "fsdp":
            model, weights = map_student_model(config.pivot)
        else:
            model = load_student_model(config.pivot)
        if config.lora.rank:
            add_adapters(model, config.lora, config.seed)
        student = Student(model, config.objective, self.form)
        self.matrices = frozenset(name for name, one in student.named_parameters() if one.ndim >= 2)
        self.flops = ModelFlops.of(model)
        self.student = spread(student, config, weights, self._data_mesh())
        torch.manual_seed(config.seed + self.global_rank)  # whatever is drawn from now on belongs to this rank's rows
        self.is_loaded = True

    def _data_mesh(self) -> DeviceMesh | None:
        return None if self.device_mesh is None else self.device_mesh["data_parallel"]

    def training_step(self, step: OptimizerStep, number: int) -> None:
        optimizer, schedule = self._optimizer(), self.lr_schedulers()
        assert isinstance(schedule, torch.optim.lr_scheduler.LRScheduler)
        self.step = step
        optimizer.zero_grad()
        self.outcome = self._outcome(self._accumulate(step), step.rows)
        self._log_outcome()
        optimizer.step()
        schedule.step()

    def _accumulate(self, step: OptimizerStep) -> Tensor:
        """Gradients of all micro-batches; the parts of `TargetLoss`, summed over the rows of this device: [3]."""
        # Devices average their gradients; the loss is a sum over all of them.
        scale = self.trainer.world_size / step.rows
        found: list[Tensor] = []
        for place, batch in enumerate(step.micro_batches, 1):
            is_last = place == len(step.micro_batches)
            with nullcontext() if is_last else accumulating(self.trainer.strategy, self.student):
                loss = self.student(batch)
                self.manual_backward(loss.loss * scale)
            found.append(torch.stack([part.detach().float() for part in loss]))
        return torch.stack(found).sum(0)

    def _outcome(self, sums: Tensor, rows: Tensor) -> StepOutcome:
        """Clip, and bring the numbers of all devices together: what is not finite on one is so on all."""
        norm = clip_gradients(self.student, self.optim.grad_clip)
        own = torch.cat([sums / rows, norm[None] / self.trainer.world_size])
        return StepOutcome(*self.trainer.strategy.reduce(own, reduce_op="sum").unbind())

    def _log_outcome(self) -> None:
        """Tensors, so that a device has to be waited for only where a logger writes."""
        values = {**self.outcome._asdict(), "lr": self._optimizer().param_groups[0]["lr"]}
        self.log_dict({f"train/{name}": value for name, value in values.items()}, batch_size=1)

    def _optimizer(self) -> LightningOptimizer:
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        return optimizer

    def configure_optimizers(self) -> OptimizerLRScheduler:
        trained = [(own_name(name), one) for name, one in self.student.named_parameters() if one.requires_grad]
        groups = [
            {
                "params": [one for name, one in trained if name in self.matrices],
                "weight_decay": self.optim.weight_decay,
            },
            {"params": [one for name, one in trained if name not in self.matrices], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.optim.lr, betas=(self.optim.betas[0], self.optim.betas[1]))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate(self.optim, self.total_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def clip_gradients(student: torch.nn.Module, largest: float) -> Tensor:
    """The norm of all gradients together, over all shards, as a float32 scalar; above `largest` they are scaled down
    to it (0: never)."""
    if isinstance(student, FullyShardedDataParallel):  # it alone knows that its gradients are shards
        return student.clip_grad_norm_(largest or math.inf).float()
    parameters = list(student.parameters())
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if largest:
        torch.nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).float()
