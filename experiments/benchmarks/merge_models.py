"""Llama checkpoints of any size for the merging benchmark, written piece by piece: a base and targets near it."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fusion.merging.checkpoints.tensor_file import LENGTH_BYTES

PIECE, DISTINCT = 1 << 22, 8
"""Elements that are made at once, and how many different pieces there are: they repeat, since drawing takes long."""
SPREAD, STEP = 0.02, 1e-3
"""Standard deviations of the base's weights and of the deltas: those of a fine-tune in bfloat16."""


@dataclass(frozen=True)
class Shape:
    hidden: int
    intermediate: int
    layers: int
    vocab: int

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes in the order of the file."""
        yield "model.embed_tokens.weight", (self.vocab, self.hidden)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            yield f"{prefix}.input_layernorm.weight", (self.hidden,)
            for name in ("q", "k", "v", "o"):
                yield f"{prefix}.self_attn.{name}_proj.weight", (self.hidden, self.hidden)
            yield f"{prefix}.post_attention_layernorm.weight", (self.hidden,)
            for name in ("gate", "up"):
                yield f"{prefix}.mlp.{name}_proj.weight", (self.intermediate, self.hidden)
            yield f"{prefix}.mlp.down_proj.weight", (self.hidden, self.intermediate)
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocab, self.hidden)

    @property
    def num_elements(self) -> int:
        return sum(math.prod(shape) for _, shape in self.tensors())

    def config(self) -> dict[str, object]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "torch_dtype": "bfloat16",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.hidden // 64,
            "num_key_value_heads": self.hidden // 64,
            "vocab_size": self.vocab,
            "tie_word_embeddings": False,
        }


TINY = Shape(hidden=512, intermediate=1536, layers=24, vocab=32_000)
SMALL = Shape(hidden=1024, intermediate=3072, layers=24, vocab=32_000)
LARGE = Shape(hidden=2560, intermediate=8704, layers=32, vocab=32_000)


def make_models(folder: Path, shape: Shape, num_targets: int) -> tuple[Path, list[Path]]:
    """Folders of a base and of targets, bfloat16, made of seeds; those that are there are taken as they are."""
    base = _make(folder / "base", shape, None)
    return base, [_make(folder / f"target{j}", shape, j) for j in range(num_targets)]


def _make(folder: Path, shape: Shape, target: int | None) -> Path:
    path = folder / "model.safetensors"
    if path.is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape.config()))
    pieces = [_piece(target, number) for number in range(DISTINCT)]
    unfinished = path.with_suffix(".tmp")
    with unfinished.open("wb") as file:
        file.write(_header(shape))
        for number, start in enumerate(range(0, shape.num_elements, PIECE)):
            values = pieces[number % DISTINCT][: shape.num_elements - start]
            file.write(values.view(torch.uint8).numpy().data)
    unfinished.rename(path)
    return folder


def _piece(target: int | None, number: int) -> Tensor:
    """bfloat16 [PIECE] of the base, or of a target near it."""
    values = SPREAD * torch.randn(PIECE, generator=torch.Generator().manual_seed(number))
    if target is not None:
        noise = torch.Generator().manual_seed(DISTINCT * (1 + target) + number)
        values += STEP * torch.randn(PIECE, generator=noise)
    return values.to(torch.bfloat16)


def _header(shape: Shape) -> bytes:
    entries, position = {}, 0
    for name, sizes in shape.tensors():
        end = position + 2 * math.prod(sizes)
        entries[name] = {"dtype": "BF16", "shape": list(sizes), "data_offsets": [position, end]}
        position = end
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text
