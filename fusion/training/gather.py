"""A trained model in one piece, wherever its weights are."""

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import PreTrainedModel

from fusion.training.lora import add_adapters, merge_adapters
from fusion.training.module import FusionModule
from fusion.training.parallel import own_name

PREFIX = "student.model."


def whole_model(trainer: pl.Trainer, module: FusionModule) -> PreTrainedModel | None:
    """The model on the CPU of the first process, its adapters merged; None on the others; all of them have to ask."""
    model = _gathered(trainer, module)
    if model is not None and module.config.lora.rank:
        merge_adapters(model)
    return model


def _gathered(trainer: pl.Trainer, module: FusionModule) -> PreTrainedModel | None:
    trained = module.model
    if trainer.world_size == 1 and module.config.parallel.name == "single":
        return trained
    found = _whole_weights(trainer, module)
    if not trainer.is_global_zero:
        return None
    weights = {own_name(name).removeprefix(PREFIX): weight for name, weight in found.items()}
    with torch.device("meta"):
        whole = type(trained)(trained.config)
        if module.config.lora.rank:
            add_adapters(whole, module.config.lora, module.config.seed)
    whole.load_state_dict(weights, assign=True)
    whole.tie_weights()
    whole.generation_config = trained.generation_config
    _copy_buffers(trained, whole)
    return whole


def _whole_weights(trainer: pl.Trainer, module: FusionModule) -> dict[str, Tensor]:
    """On the CPU; what the processes but the first one get is of no use."""
    if not isinstance(module.student, FullyShardedDataParallel):
        return {name: one.cpu() for name, one in trainer.strategy.lightning_module_state_dict().items()}
    with FullyShardedDataParallel.summon_full_params(module.student, writeback=False):
        return {name: one.cpu().clone() for name, one in module.state_dict().items()} if trainer.is_global_zero else {}


def _copy_buffers(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """Those that are not saved too, such as the frequencies of rotary embeddings: every process has them whole."""
    for name, buffer in source.named_buffers():
        path, _, leaf = own_name(name).rpartition(".")
        setattr(target.get_submodule(path), leaf, buffer.detach().cpu())
