"""Heads that are their model's embedding: some files store the copy, others do not."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fusion.config import raise_problems
from fusion.merging.checkpoints.checkpoint import Checkpoint
from fusion.merging.deltas import block_length
from fusion.merging.layers import is_embedding
from fusion.merging.plan import input_labels

HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out|output_layer)\.weight$")
TIED = "tie_word_embeddings"


def without_copies(inputs: Mapping[str, Checkpoint]) -> dict[str, Checkpoint]:
    """Leave out heads that repeat the embedding where the models are tied: where an input stores no head, or where all
    configs say so.

    Raises:
        UserError: a model without a head of its own is to be merged with one that has another head than its embedding.
    """
    without = dict(inputs)
    problems: list[str] = []
    labels = dict(zip(inputs, input_labels(inputs), strict=True))
    for head in sorted({name for checkpoint in inputs.values() for name in checkpoint if HEAD.search(name)}):
        tied = [role for role, checkpoint in inputs.items() if head not in checkpoint]
        stored = [role for role in inputs if role not in tied]
        if not tied and not all(checkpoint.config.get(TIED) is True for checkpoint in inputs.values()):
            continue
        own = [role for role in stored if not _repeats_embedding(inputs[role], head)]
        if own:
            problems += [
                f"{labels[role]}: '{head}' is not its embedding, but {labels[tied[0]]} stores no head, so that its "
                "head is its embedding: save both models alike"
                for role in own
                if tied
            ]
            continue
        for role in stored:
            homes = {name: home for name, home in without[role].homes.items() if name != head}
            without[role] = replace(without[role], homes=homes)
    raise_problems(problems)
    return without


def _repeats_embedding(checkpoint: Checkpoint, head: str) -> bool:
    spec = checkpoint.homes[head].specs[head]
    tables = [name for name in checkpoint if is_embedding(name) and checkpoint.homes[name].specs[name] == spec]
    return any(
        all(torch.equal(a_N, b_N) for a_N, b_N in zip(blocks(checkpoint, head), blocks(checkpoint, name), strict=True))
        for name in tables
    )


def blocks(checkpoint: Checkpoint, name: str) -> Iterator[Tensor]:
    """A tensor's elements in the blocks of a merge, each new memory [N], so that a large one never is there whole."""
    home = checkpoint.homes[name]
    spec = home.specs[name]
    length = block_length(spec.shape)
    for start in range(0, spec.num_elements, length):
        block_N = torch.empty(min(length, spec.num_elements - start), dtype=spec.dtype)
        home.read_span(name, start, block_N)
        yield block_N
