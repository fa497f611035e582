"""Small models for the merge tests."""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from fusion.merging import MergeMethod, TensorDeltas, load_method, method_names

DATA_FREE = [name for name in method_names() if load_method(name).evidence is None]
"""Methods that need nothing but weights; the others are tested in test_measured_methods.py."""


def width(name: str, usual: int = 3) -> int:
    """How many targets to try a method with."""
    return load_method(name).num_targets or usual


SHAPES = {
    "model.embed_tokens.weight": (11, 6),
    "model.layers.0.mlp.weight": (9, 6),
    "model.layers.1.mlp.weight": (6, 9),
    "model.norm.weight": (6,),
}


def make_state(seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: (scale * torch.randn(shape, generator=generator)).to(dtype) for name, shape in SHAPES.items()}


def make_family(num_targets: int = 3, dtype: torch.dtype = torch.float32) -> tuple[dict, list[dict]]:
    """A base, and targets that differ from it by small deltas."""
    base = make_state(0)
    targets = []
    for j in range(num_targets):
        step = make_state(j + 1, scale=0.02 * (j + 1))
        targets.append({name: (base[name] + step[name]).to(dtype) for name in base})
    return {name: tensor.to(dtype) for name, tensor in base.items()}, targets


def save_model(folder: Path, state: dict[str, Tensor], *, num_shards: int = 1, **config: object) -> Path:
    folder.mkdir(parents=True)
    names = list(state)
    if num_shards == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        weight_map = {
            name: f"model-{i % num_shards + 1:05}-of-{num_shards:05}.safetensors" for i, name in enumerate(names)
        }
        for shard in sorted(set(weight_map.values())):
            held = {name: state[name] for name in names if weight_map[name] == shard}
            save_file(held, folder / shard, metadata={"format": "pt"})
        total = sum(tensor.nbytes for tensor in state.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    settings = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **config}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


class Merged(NamedTuple):
    """One merged tensor: its delta [N], the coefficients [J], and what happened."""

    delta: Tensor
    coefficients: Tensor
    events: tuple[str, ...]


def merge_tensor(
    method: MergeMethod,
    deltas: Tensor,
    *,
    name: str = "",
    seed: int = 0,
    evidence: object = None,
    **parameters: object,
) -> Merged:
    """What a method makes of deltas in memory, [J, ...]."""
    lazy = TensorDeltas.of(deltas, name, seed, evidence)
    merged = method(lazy, **parameters)
    return Merged(torch.cat(lazy.map(merged.delta)), merged.coefficients, merged.events)
