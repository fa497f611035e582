"""A training of several processes, as their starter sees it: handed over as files, followed, and told of as one.

`fusion.training.distributed` is what the processes run. Nothing of the starter's own state gets into them: they read
their settings from the handover, and what was prepared from the cache.
"""

import gc
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from omegaconf import OmegaConf
from pytorch_lightning.loggers import Logger

from fusion.cache import write_json
from fusion.config import UserError
from fusion.config.compose import to_settings
from fusion.config.schema import TrainConfig
from fusion.dialogues.tokenizer import load_tokenizer
from fusion.objective.fused_store import FusedStore
from fusion.processes.failures import Failure, Terminated
from fusion.processes.starter import Group, Node, run_group
from fusion.training.checkpoint_folder import Checkpoint
from fusion.training.data import FusionDataModule
from fusion.training.parallel import accelerator
from fusion.training.prepare import Prepared

MODULE = "fusion.training.distributed"
GRACE_SECONDS = 300
"""For a checkpoint before the end."""


@dataclass(frozen=True)
class Trained:
    """What is known of a training whose model lies in its folder."""

    steps: int
    seconds: float
    metrics: dict[str, float]


@dataclass(frozen=True)
class Task:
    """What the processes are to train, and on what."""

    config: TrainConfig
    """Models and dialogues have real paths."""
    store: Path
    """Fused targets."""
    inputs: dict[str, str]
    """Hashes of models and dialogues."""
    folder: Path
    """The job's; the model goes into it."""
    card: str
    """Text of the model card."""
    start: Path | None = None
    """Checkpoint to go on from."""

    def save(self, handover: Path) -> None:
        paths = {"store": str(self.store), "folder": str(self.folder), "start": self.start and str(self.start)}
        plain = {"config": asdict(self.config), "inputs": self.inputs, "card": self.card}
        write_json(handover / "task.json", {**paths, **plain})

    @classmethod
    def load(cls, handover: Path) -> "Task":
        plain = json.loads((handover / "task.json").read_text("utf-8"))
        config = to_settings(OmegaConf.create(plain["config"]), TrainConfig)
        start = Path(plain["start"]) if plain["start"] else None
        return cls(config, Path(plain["store"]), plain["inputs"], Path(plain["folder"]), plain["card"], start)

    def data(self) -> FusionDataModule:
        """The data module as its processes need it: no model and no dialogue is read again."""
        module = FusionDataModule(self.config)
        tokenizer = load_tokenizer(self.config.pivot)
        module.prepared = Prepared(FusedStore(self.store), [], [], {}, self.inputs, tokenizer)
        return module


class Metrics:
    """Metrics that the first process logs, as lines of a file; the starter hands them on to its loggers."""

    def __init__(self, handover: Path) -> None:
        self._path = handover / "metrics.jsonl"
        self._read = 0

    def write(self, metrics: dict[str, float], step: int | None) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([metrics, step]) + "\n")

    def news(self) -> Iterator[tuple[dict[str, float], int | None]]:
        """Whole lines since the last call."""
        if not self._path.is_file():
            return
        with self._path.open("rb") as file:
            file.seek(self._read)
            for line in file:
                if line.endswith(b"\n"):
                    self._read += len(line)
                    metrics, step = json.loads(line)
                    yield metrics, step


def train_in_processes(
    config: TrainConfig,
    data: FusionDataModule,
    loggers: Sequence[Logger],
    folder: Path,
    card: str,
    node: Node,
    start: Checkpoint | None = None,
) -> Trained:
    """Train with `parallel.devices` processes on this machine, which is `node`; the first node has `folder / "model"`
    afterwards. The data module must have been set up; `start` is what the first node says.

    Raises:
        UserError: as `fit` does.
        RuntimeError: a process failed otherwise; all of them are gone by then.
        Terminated: they were told to end.
    """
    assert data.prepared is not None
    handover = folder / "handover" / str(node.number)
    shutil.rmtree(handover, ignore_errors=True)
    handover.mkdir(parents=True)
    paths = (data.prepared.fused.folder.resolve(), data.prepared.inputs, folder.resolve())
    Task(config, *paths, card, start.folder.resolve() if start else None).save(handover)
    _free_gpus()
    metrics = Metrics(handover)
    group = Group(
        module=MODULE,
        handover=handover.resolve(),
        size=config.parallel.devices,
        node=node,
        sees_gpus=accelerator(config.parallel) != "cpu",
        is_heard=True,
        grace_seconds=GRACE_SECONDS,
    )
    failure = run_group(group, lambda: _hand_on(metrics, loggers))
    if failure is not None:
        _fail(config, failure)
    trained = Trained(**json.loads((handover / "result.json").read_text("utf-8")))
    shutil.rmtree(handover)
    with suppress(OSError):  # other nodes may have theirs
        handover.parent.rmdir()
    return trained


def _free_gpus() -> None:
    """The teachers of this process are gone; their memory goes to the processes."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _hand_on(metrics: Metrics, loggers: Sequence[Logger]) -> None:
    for values, step in metrics.news():
        for logger in loggers:
            logger.log_metrics(values, step)
            logger.save()


def _fail(config: TrainConfig, failure: Failure) -> None:
    if failure.is_of_user:
        raise UserError(failure.problems)
    if failure.is_wanted:
        raise Terminated("; ".join(failure.problems))
    raise RuntimeError(
        "\n    ".join(
            [
                f"training: the {config.parallel.devices} processes of parallel={config.parallel.name} failed with "
                f"status {failure.status}. What the first one said:",
                *failure.problems,
            ]
        )
    )
