"""Causal language models: loaded safely, and split into decoder and head so that few logits need exist.

Tensor legend: B dialogues, T tokens, H hidden size, V vocabulary, R rows.
"""

import sys
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from fusion.config import UserError
from fusion.config.schema import ModelConfig


def load_causal_lm(model: ModelConfig, dtype: str | None = None, **placing: Any) -> PreTrainedModel:
    """Load `model.path` from safetensors, in `dtype` (default: the setting's), in evaluation mode.

    `placing` says where the weights go, in the words of transformers' `from_pretrained` (device_map,
    distributed_config); nothing of it means the CPU.

    Raises:
        UserError: the folder is missing, holds no safetensors weights, or is no causal language model.
    """
    if not sys.stderr.isatty():
        disable_progress_bar()
    try:
        found: Any = AutoModelForCausalLM.from_pretrained(
            model.path,
            revision=model.revision,
            dtype=dtype or model.dtype,
            trust_remote_code=model.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are told of below
            **placing,
        )
    except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{model.name} (path={model.path}): the model cannot be loaded: {reason[0]}") from error
    loaded, details = found
    _check_weights(model, details)
    return loaded.eval()


def _check_weights(model: ModelConfig, details: Mapping[str, Any]) -> None:
    """Refuse what transformers would draw at random: weights that the files lack, or have in another shape."""
    where = f"{model.name} (path={model.path}): the model cannot be loaded"
    if details["missing_keys"]:
        raise UserError(f"{where}: its files lack {', '.join(sorted(details['missing_keys'])[:3])}")
    if details["mismatched_keys"]:
        name, stored, wanted = min(details["mismatched_keys"])
        raise UserError(f"{where}: {name} is {list(stored)} in its files, but its config asks for {list(wanted)}")


def stored_dtype(model: ModelConfig) -> torch.dtype:
    """The dtype in which the weights of `model` are stored; targets keep it, so that they can be merged with it."""
    config = AutoConfig.from_pretrained(model.path, revision=model.revision, trust_remote_code=model.trust_remote_code)
    dtype = config.get_text_config().dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def final_hidden(
    model: PreTrainedModel, ids_BT: Tensor, mask_BT: Tensor, positions_BT: Tensor | None = None
) -> Tensor:
    """Hidden states after the last layer and norm, before the head: [B, T, H], on the device of `ids_BT`.

    `positions_BT` tells that several dialogues stand in a row, which has no padding then: each begins at position 0.
    """
    # Where no mask is given, transformers finds the dialogues of a row in its positions.
    places = {"attention_mask": mask_BT} if positions_BT is None else {"position_ids": positions_BT}
    hidden = model.base_model(input_ids=ids_BT, use_cache=False, **places).last_hidden_state
    return hidden.to(ids_BT.device)  # the layers of a model that is spread over devices may end on another one


def head(model: PreTrainedModel) -> torch.nn.Linear:
    """The output embedding; a module with `weight` [V, H] and maybe a bias."""
    module = model.get_output_embeddings()
    assert isinstance(module, torch.nn.Linear), f"unexpected head {type(module).__name__}"
    return module


def logits_device(model: PreTrainedModel) -> torch.device:
    """The device on which `head(model)` leaves logits; token ids are given there, hooks move them if need be."""
    weight = head(model).weight
    if weight.device.type != "meta":
        return weight.device
    # Offloaded weights visit the first accelerator of the map that accelerate has made, else the CPU.
    placed = cast(dict[str, int | str], model.hf_device_map)
    devices = [device for device in placed.values() if device not in ("cpu", "disk")]
    return torch.device(devices[0] if devices else "cpu")


def has_plain_head(model: PreTrainedModel) -> bool:
    """Whether logits are exactly head(hidden): false for models that scale or cap them (Gemma-2, Granite, Cohere)."""
    return explains_logits(model, head(model))


@torch.no_grad()
def explains_logits(model: PreTrainedModel, logits_of: Callable[[Tensor], Tensor]) -> bool:
    """Whether `logits_of` turns final hidden states [B, T, H] into the logits [B, T, V] that `model` itself gives."""
    device = logits_device(model)
    ids_BT = torch.arange(1, 9, device=device).unsqueeze(0) % int(model.config.get_text_config().vocab_size)
    mask_BT = torch.ones_like(ids_BT)
    logits = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits.float()
    ours = logits_of(final_hidden(model, ids_BT, mask_BT)).float()
    tolerance = 1e-4 if next(model.parameters()).dtype == torch.float32 else 5e-2
    largest = float(logits.nan_to_num().abs().max())  # NaN weights are told of when rows are read
    return bool(torch.allclose(logits, ours, rtol=tolerance, atol=tolerance * largest, equal_nan=True))


def embedding_rows(model: PreTrainedModel) -> int:
    """Tokens that the model embeds."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return len(weight)


def on_device(model: PreTrainedModel, word: str = "auto") -> PreTrainedModel:
    """Move `model` to the device of that name; `auto` is the first accelerator, else the CPU."""
    device = word if word != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.nn.Module.to(model, torch.device(device))
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch is built without that accelerator
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"teacher.device={word}: the model cannot be moved there: {reason}") from error
    return model
