"""The shape of a model: from its folder, from the hub's cache, from a recipe's facts, or from the built-in world."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusion.config import UserError
from fusion.config.schema import ModelConfig
from fusion.config.shape import ShapeConfig
from fusion.config.world import TinyModelConfig, WorldConfig
from fusion.planning.step_memory import LayerSizes

WORLD, WORLD_INNER = "world:", 2.5
CONFIG, WEIGHTS = "config.json", "*.safetensors"
BITS = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
"""safetensors' names of number formats -> bytes of a number."""


@dataclass(frozen=True)
class ModelShape:
    facts: ShapeConfig
    stored_bytes: int
    """Bytes of a number in the model's files; a target is stored alike."""

    @property
    def parameters(self) -> int:
        return self.facts.parameters

    @property
    def head_parameters(self) -> int:
        return self.facts.vocab_size * self.facts.hidden_size

    @property
    def matrices(self) -> int:
        """Weights that a token is multiplied with in the decoder: no embedding, and of experts the active ones."""
        facts = self.facts
        idle = max(facts.experts - facts.active_experts, 0) * 3 * facts.hidden_size * facts.inner_size * facts.layers
        return self.parameters - self.head_parameters * (1 if facts.tied else 2) - idle

    @property
    def sizes(self) -> LayerSizes:
        facts = self.facts
        inner = facts.inner_size * max(facts.active_experts, 1)
        return LayerSizes(facts.layers, facts.hidden_size, facts.key_value_heads * facts.head_size, inner)


def model_shape(model: ModelConfig, world: WorldConfig) -> ModelShape:
    """The shape of `model`, whose weights need not be here.

    Raises:
        UserError: nothing is known about it here.
    """
    if model.path.startswith(WORLD):
        return _of_world(model, world)
    folder = _config_folder(model)
    if folder is not None:
        return _of_folder(folder, model)
    shape = model.shape if isinstance(model.shape, ShapeConfig) else ShapeConfig(**model.shape)
    if shape.parameters:
        return ModelShape(shape, 2)
    raise UserError(
        f"{model.name} (path={model.path}): neither a folder here nor in the hub's cache, so nothing is known of its "
        "size; "
        "give what its config.json says: +shape of conf/model/*.yaml, or download it first"
    )


def _config_folder(model: ModelConfig) -> Path | None:
    """The folder that holds the model's config.json, where there is one on this machine."""
    if (Path(model.path) / CONFIG).is_file():
        return Path(model.path)
    if model.path.count("/") != 1 or model.path.startswith((".", "~")):
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model.path, CONFIG, revision=model.revision)
    return Path(found).parent if isinstance(found, str) else None


def _of_folder(folder: Path, model: ModelConfig) -> ModelShape:
    try:
        whole = json.loads((folder / CONFIG).read_text("utf-8"))
        facts = _facts(whole.get("text_config") or whole)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise UserError(
            f"{model.name} (path={model.path}): its {CONFIG} does not tell its shape: {error!r}"
        ) from error
    counted, stored = counted_weights(folder)
    parameters = counted or facts.parameters or guessed_parameters(facts)
    return ModelShape(ShapeConfig(**{**vars(facts), "parameters": parameters}), stored or 2)


def _facts(config: Mapping[str, Any]) -> ShapeConfig:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    experts = config.get("num_local_experts") or config.get("num_experts") or 0
    inner = config.get("intermediate_size") or 4 * hidden
    return ShapeConfig(
        model_type=config.get("model_type", ""),
        hidden_size=hidden,
        inner_size=(config.get("moe_intermediate_size") or inner) if experts else inner,
        layers=config["num_hidden_layers"],
        heads=heads,
        key_value_heads=config.get("num_key_value_heads") or heads,
        head_size=config.get("head_dim") or hidden // heads,
        vocab_size=config["vocab_size"],
        tied=bool(config.get("tie_word_embeddings", False)),
        experts=experts,
        active_experts=config.get("num_experts_per_tok") or 0,
    )


def counted_weights(folder: Path) -> tuple[int, int]:
    """Numbers in the safetensors files, from their headers alone, and bytes of one; zeros where there are no files.

    Raises:
        UserError: a file has no header of safetensors.
    """
    numbers: dict[str, int] = {}
    for file in sorted(folder.glob(WEIGHTS)):
        try:
            for tensor in _header(file).values():
                numbers[tensor["dtype"]] = numbers.get(tensor["dtype"], 0) + math.prod(tensor["shape"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file}: no file of safetensors, or cut off: copy or download it again") from error
    most = max(numbers, key=numbers.__getitem__, default="")
    return sum(numbers.values()), BITS.get(most, 0)


def _header(file: Path) -> dict[str, Any]:
    """What a safetensors file says of its tensors: https://huggingface.co/docs/safetensors."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > file.stat().st_size:
            raise ValueError(f"a header of {length} bytes")
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    return header


def guessed_parameters(facts: ShapeConfig) -> int:
    """Weights of a decoder of Llama's kind with these sizes; biases and norms of heads are left out."""
    hidden, width = facts.hidden_size, facts.heads * facts.head_size
    attention = hidden * (2 * width + 2 * facts.key_value_heads * facts.head_size)
    forward = 3 * hidden * facts.inner_size * max(facts.experts, 1) + hidden * facts.experts
    embeddings = facts.vocab_size * hidden * (1 if facts.tied else 2)
    return embeddings + facts.layers * (attention + forward + 2 * hidden) + hidden


def _of_world(model: ModelConfig, world: WorldConfig) -> ModelShape:
    name = model.path.removeprefix(WORLD)
    if name not in world.models:
        raise UserError(f"path={model.path}: the world has no such model; it has {', '.join(sorted(world.models))}")
    tiny: TinyModelConfig = world.models[name]
    facts = ShapeConfig(
        model_type=tiny.architecture,
        hidden_size=tiny.hidden_size,
        inner_size=int(WORLD_INNER * tiny.hidden_size),
        layers=tiny.layers,
        heads=tiny.heads,
        key_value_heads=tiny.key_value_heads,
        head_size=tiny.hidden_size // tiny.heads,
        vocab_size=tiny.vocab_size,
    )
    return ModelShape(ShapeConfig(**{**vars(facts), "parameters": guessed_parameters(facts)}), 4)
