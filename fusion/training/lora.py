"""Low-rank adapters (LoRA, https://arxiv.org/abs/2106.09685): beside a weight W stands B A alpha / rank, and only A
and B are trained.

They are put into the model's own layers and merged into their weights at the end, so that the class of the model, its
names and its folder are ordinary ones. Needs peft.
"""

import importlib.util
from collections.abc import Sequence
from difflib import get_close_matches

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fusion.config import UserError, raise_problems
from fusion.config.schema import LoraConfig

ALL = "all-linear"


def add_adapters(model: PreTrainedModel, settings: LoraConfig, seed: int) -> None:
    """Freeze `model` and put adapters into its layers; B is zero, so its outputs stay what they are.

    A is drawn from `seed` alone, the same on every device.

    Raises:
        UserError: peft is missing, or `settings.modules` name no linear layer.
    """
    if importlib.util.find_spec("peft") is None:
        raise UserError(f"lora.rank={settings.rank}: the package peft is missing; pip install 'fusion-chat[lora]'")
    from peft import LoraConfig as Adapters
    from peft import inject_adapter_in_model

    layers = adapted_layers(model, settings.modules)
    adapters = Adapters(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # any number will do
        lora_dropout=settings.dropout,
        target_modules=layers,
        fan_in_fan_out=any(isinstance(model.get_submodule(name), Conv1D) for name in layers),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(adapters, model)


def adapted_layers(model: PreTrainedModel, modules: Sequence[str]) -> list[str]:
    """Full names of the linear layers whose names end in one of `modules`; the head is never one of them.

    Raises:
        UserError: one of `modules` is the end of no such name; the message has the nearest ones.
    """
    head = model.get_output_embeddings()
    layers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
    ]
    if list(modules) == [ALL]:
        return layers
    raise_problems([_no_match(word, layers) for word in modules if not any(_ends(name, word) for name in layers)])
    if not modules:
        raise UserError(f"lora.modules is empty; name layers, or leave it out to adapt every linear one ({ALL})")
    return [name for name in layers if any(_ends(name, word) for word in modules)]


def _ends(name: str, word: str) -> bool:
    return f".{name}".endswith(f".{word}")


def _no_match(word: str, layers: Sequence[str]) -> str:
    known = sorted({name.rpartition(".")[2] for name in layers})
    close = get_close_matches(word, known, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"lora.modules={word}: no linear layer has a name that ends so{hint} (there are: {', '.join(known)})"


@torch.no_grad()
def merge_adapters(model: PreTrainedModel) -> None:
    """Add the adapters to the weights beside them and take them out: an ordinary model is left."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            model.set_submodule(name, module.get_base_layer())
    del model.peft_config
