"""A merge's targets: whole models, or LoRA adapters of the base; with the base's vocabulary or their own."""

from pathlib import Path

from fusion.merging.adapter import open_adapter
from fusion.merging.checkpoint import Checkpoint, is_adapter, open_checkpoint
from fusion.merging.vocabulary import BASE, ERROR, in_vocabulary_of


def open_target(folder: Path, base: Checkpoint | None, vocabulary: str = ERROR) -> Checkpoint:
    """The weights that `folder` stands for; with `vocabulary="base"` in the rows of the base's tokens.

    Raises:
        UserError: as `open_checkpoint`, `open_adapter` and `in_vocabulary_of`.
    """
    if is_adapter(folder):
        return open_adapter(folder, base)
    target = open_checkpoint(folder)
    return target if base is None or vocabulary != BASE else in_vocabulary_of(base, target)
