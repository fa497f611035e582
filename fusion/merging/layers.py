"""Where in a model a tensor stands, as far as its name tells."""

import re
from collections.abc import Sequence
from functools import cache

LAYER = re.compile(r"(?:.*?\.)?\d+(?=\.)")
EMBEDDING = re.compile(r"embed(?!_out)(?!\w*norm)|\bw[tp]e\b")
"""Tables that tokens or positions are looked up in; GPT-NeoX calls its head embed_out."""


@cache
def layer_of(name: str) -> str:
    """`model.layers.7` of `model.layers.7.mlp.up_proj.weight`; a tensor outside every numbered layer is its own."""
    layer = LAYER.match(name)
    return layer.group() if layer else name


def is_embedding(name: str) -> bool:
    """Whether a tensor outside all numbered layers is an embedding table."""
    return LAYER.match(name) is None and EMBEDDING.search(name) is not None


def depths_of(names: Sequence[str]) -> dict[str, float]:
    """How deep each tensor lies: 0 in a stack's first layer, 1 in its last, in equal steps.

    Embeddings lie at 0; all else outside of numbered layers, such as the final norm and the head, at 1.
    """
    stacks: dict[str, int] = {}
    for name in filter(LAYER.match, names):
        stack, number = _numbered(name)
        stacks[stack] = max(number, stacks.get(stack, 0))
    return {name: _depth(name, stacks) for name in names}


def _depth(name: str, last_numbers: dict[str, int]) -> float:
    if not LAYER.match(name):
        return 0.0 if is_embedding(name) else 1.0
    stack, number = _numbered(name)
    return number / max(1, last_numbers[stack])


def _numbered(name: str) -> tuple[str, int]:
    """`model.layers` and 7 of a tensor in `model.layers.7`."""
    stack, _, number = layer_of(name).rpartition(".")
    return stack, int(number)
