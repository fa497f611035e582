"""A merge's targets: whole models, or LoRA adapters of the base."""

from pathlib import Path

from fusion.merging.checkpoints.adapter import open_adapter
from fusion.merging.checkpoints.checkpoint import Checkpoint, is_adapter, open_checkpoint


def open_target(folder: Path, base: Checkpoint | None) -> Checkpoint:
    """The weights that `folder` stands for.

    Raises:
        UserError: as `open_checkpoint` and `open_adapter`.
    """
    return open_adapter(folder, base) if is_adapter(folder) else open_checkpoint(folder)
