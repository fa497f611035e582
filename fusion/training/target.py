"""From fused targets to a model's folder: in this process, or in several that it starts."""

from collections.abc import Sequence
from pathlib import Path

from pytorch_lightning.loggers import Logger

from fusion.config.schema import TrainConfig
from fusion.processes.starter import Node
from fusion.teaching.causal_lm import stored_dtype
from fusion.training.checkpoint_folder import Checkpoint
from fusion.training.data import FusionDataModule
from fusion.training.export import export_model
from fusion.training.fit import fit
from fusion.training.parallel import check_devices
from fusion.training.processes import Trained, train_in_processes


def train_target(
    config: TrainConfig,
    data: FusionDataModule,
    loggers: Sequence[Logger],
    folder: Path,
    card: str,
    node: Node,
    start: Checkpoint | None = None,
) -> Trained:
    """Train a copy of the pivot, from `start` on, and leave it in `folder / "model"`; checkpoints lie in `folder` too.
    The data module must have been set up.

    Raises:
        UserError: the devices are not there, or what `fit` raises.
        RuntimeError: one of several processes failed.
        Terminated: the training was told to end.
    """
    check_devices(config.parallel)
    if config.parallel.name != "single":
        return train_in_processes(config, data, loggers, folder, card, node, start)
    fitted = fit(config, data, list(loggers), folder, start)
    assert fitted.model is not None
    assert data.prepared is not None
    export_model(fitted.model, data.prepared.tokenizer, folder / "model", stored_dtype(config.pivot), card)
    return Trained(fitted.steps, fitted.seconds, fitted.metrics)
