"""Packing is checked on the model itself: dialogues in one row must read what each of them reads alone.

Not every architecture looks at positions to find the dialogues of a row, and none says so: recurrent models carry
their state along, others take the row for one text.
Tensor legend: T tokens, H hidden size.
"""

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from fusion.config import UserError
from fusion.objective.fused_store import FusedExample
from fusion.teaching.sparse_rows import loose_rows
from fusion.training.batches import FusionBatch, collate
from fusion.training.module import FusionModule
from fusion.training.student import Student

LENGTHS = (6, 5, 4)
"""Tokens of the dialogues that are tried: short, so that a look into the one before shows in most of their tokens."""
EXACT_ERROR, ROUNDED_ERROR = 1e-3, 5e-2
"""Allowed relative error of a token's hidden state: in float32 of the worst token (TF32 counts as float32), in less
precision of half the tokens behind the first dialogue, because routers may send single ones to another expert."""


class PackingCheck(Callback):
    """Stops a run before its first step when the model cannot tell packed dialogues apart."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, FusionModule)
        with trainer.precision_plugin.train_step_context():
            require_packing(pl_module.student, pl_module.device)


@torch.no_grad()
def require_packing(student: Student, device: torch.device) -> None:
    """Raises UserError unless dialogues in one row have the hidden states that each has alone."""
    dialogues = [_dialogue(student, number) for number in range(len(LENGTHS))]
    was_training = student.training
    student.eval()
    alone = [_hidden(student, collate([one], student.form), device) for one in dialogues]
    try:
        together = _hidden(student, collate(dialogues, student.form, packed=True), device)
    except TypeError as no_positions:
        raise _refusal(student, str(no_positions)) from no_positions
    finally:
        student.train(was_training)
    error_T = _error(torch.cat(alone), together)
    is_exact = together.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(device.type)
    allowed, found = (EXACT_ERROR, error_T.max()) if is_exact else (ROUNDED_ERROR, error_T[LENGTHS[0] :].median())
    if found > allowed:  # weights that are not finite are told of by the loss
        raise _refusal(student, f"their hidden states change by {float(found):.0%}")


def _dialogue(student: Student, number: int) -> FusedExample:
    """A few different tokens with one supervised row."""
    vocab_size = int(student.model.config.get_text_config().vocab_size)
    ids_N = (1 + 7 * number + np.arange(LENGTHS[number])) % vocab_size
    nothing = np.zeros(0, dtype=np.int64)
    return FusedExample(ids_N, np.asarray([LENGTHS[number] - 2]), loose_rows(nothing, nothing, nothing, 1))


def _hidden(student: Student, batch: FusionBatch, device: torch.device) -> Tensor:
    """[T, H] after the last layer, as they occur in the student's own forward pass, whatever it is wrapped in."""
    seen: list[Tensor] = []
    hook = student.model.base_model.register_forward_hook(lambda *call: seen.append(call[-1].last_hidden_state))
    try:
        student(FusionBatch(*(None if tensor is None else tensor.to(device) for tensor in batch)))  # type: ignore[arg-type]
    finally:
        hook.remove()
    return seen[0].flatten(0, 1)


def _error(wanted_TH: Tensor, found_TH: Tensor) -> Tensor:
    wanted_TH, found_TH = wanted_TH.float(), found_TH.float()
    return (found_TH - wanted_TH).norm(dim=-1) / wanted_TH.norm(dim=-1)


def _refusal(student: Student, reason: str) -> UserError:
    config = student.model.config.get_text_config()
    return UserError(
        f"trainer.packing=true: {config.model_type} models with {config._attn_implementation} attention do not read "
        f"dialogues in one row apart from each other ({reason}); set trainer.packing=false"
    )
