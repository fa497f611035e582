"""A loss or gradient that is not finite stops a run, and the dialogues at fault are named.

The check waits for the device once per optimiser step, behind the last micro-batch and before the weights change.
"""

import pytorch_lightning as pl
import torch
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.optim import Optimizer

from fusion.config import UserError
from fusion.training.batches import collate
from fusion.training.data import FusionDataModule
from fusion.training.memory import own_part
from fusion.training.module import FusionModule
from fusion.training.parallel import accumulating
from fusion.training.ranks import from_all_ranks

SHOWN = 5
"""Weights and dialogues that a message names; it counts the others."""
BEGINNING = 20
"""Tokens of a dialogue that a message shows."""


class NotFinite(UserError):
    """Raised on every device in the same step, with the weights as the step before left them."""


class Health(pl.Callback):
    """Raises NotFinite."""

    def __init__(self, data: FusionDataModule) -> None:
        self.data = data

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: Optimizer) -> None:
        assert isinstance(module, FusionModule)
        if not bool((module.outcome.loss + module.outcome.grad_norm).isfinite()):
            raise NotFinite(self._diagnosis(trainer, module))

    def _diagnosis(self, trainer: pl.Trainer, module: FusionModule) -> str:
        outcome, settings = module.outcome, self.data.config
        step = trainer.global_step + 1
        told = [
            f"step {step}: the loss is {float(outcome.loss):g} and the gradient norm {float(outcome.grad_norm):g}; "
            "training stopped before this step could change the weights"
        ]
        spoilt = _spoilt_weights(module)
        if spoilt:
            told.append(f"weights that were not finite before it: {_listed(spoilt)}")
        told.append(self._fault(trainer, module))
        told.append(f"what helps: a lower optim.lr (now {settings.optim.lr:g}), or a look at these dialogues")
        if settings.trainer.precision != "32-true":
            told[-1] += f", or trainer.precision=32-true (now {settings.trainer.precision})"
        return "\n    ".join(told)

    def _fault(self, trainer: pl.Trainer, module: FusionModule) -> str:
        assert module.step is not None
        names = sorted(set().union(*from_all_ranks(module.step.names)))
        found = self._suspects(trainer, module)
        if not found:
            return f"no dialogue of the step does this alone, only together: {_listed(names)}"
        return f"{len(found)} of the {len(names)} dialogues do this alone: {_listed([*map(self._shown, found)])}"

    def _suspects(self, trainer: pl.Trainer, module: FusionModule) -> list[str]:
        """Content hashes of the dialogues, of all devices, whose own loss or gradient is not finite."""
        assert module.step is not None
        assert self.data.prepared is not None
        own = list(dict.fromkeys(module.step.names)) or self.data.prepared.fused.examples[:1]
        # Devices that share out the weights must read equally often.
        rounds = max(from_all_ranks(len(own)))
        found = [name for name in own + own[-1:] * (rounds - len(own)) if self._is_suspect(trainer, module, name)]
        return sorted(set().union(*from_all_ranks(found)))

    def _is_suspect(self, trainer: pl.Trainer, module: FusionModule, name: str) -> bool:
        assert self.data.prepared is not None
        store = self.data.prepared.fused
        batch = collate([store[store.examples.index(name)]], store.form)
        batch = trainer.strategy.batch_to_device(batch, trainer.strategy.root_device)
        is_shared_out = any(isinstance(one, FSDPModule | FullyShardedDataParallel) for one in module.modules())
        if is_shared_out:  # its gradients would be those of all devices together
            with torch.no_grad():
                return not bool(module.student(batch).loss.isfinite())
        module.zero_grad()
        with torch.enable_grad(), accumulating(trainer.strategy, module.student):
            loss = module.student(batch).loss
            loss.backward()
        gradients = [one.grad for one in module.parameters() if one.grad is not None]
        return not bool((loss.detach() + torch.nn.utils.get_total_norm(gradients)).isfinite())

    def _shown(self, name: str) -> str:
        assert self.data.prepared is not None
        store = self.data.prepared.fused
        ids_N = store[store.examples.index(name)].ids_N
        text = self.data.prepared.tokenizer.decode(ids_N[:BEGINNING].tolist())
        return f"{name} ({len(ids_N)} tokens: {text!r} ...)"


def _spoilt_weights(module: FusionModule) -> list[str]:
    """Names of weights with a number that is not finite, on any device."""
    own = [name for name, one in module.model.named_parameters() if not bool(own_part(one).isfinite().all())]
    return sorted(set().union(*from_all_ranks(own)))


def _listed(names: list[str]) -> str:
    rest = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")
