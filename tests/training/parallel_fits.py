"""Several trainings one after the other in one start of processes, which is what takes long.

`run_fits` starts them; the module itself is what the processes run.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partialmethod
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import torch
from pytorch_lightning.strategies import FSDPStrategy

from fusion.config.schema import TrainConfig
from fusion.processes.member import take_part
from fusion.processes.starter import Group, run_group
from fusion.training import fit, parallel, sampler
from fusion.training.data import FusionDataModule
from fusion.training.distributed import train
from fusion.training.micro_batches import Limits, deal
from fusion.training.processes import Metrics, Task

IDLE = "_idle"
"""End of the names of trainings whose devices but the first one have nothing to read, in any step."""


@dataclass(frozen=True)
class Found:
    """What a training has left."""

    losses: list[float]
    norms: list[float]
    model: Path


def run_fits(
    folder: Path,
    data: FusionDataModule,
    configs: dict[str, TrainConfig],
    size: int = 2,
    starts: Mapping[str, Path] = MappingProxyType({}),
) -> dict[str, Found]:
    """Train every config on the fused targets of `data`, in `size` processes and in the order of their names; `starts`
    are checkpoints to go on from."""
    for name, config in configs.items():
        (folder / name).mkdir(parents=True)
        paths = (data.prepared.fused.folder.resolve(), data.prepared.inputs, (folder / name).resolve())
        Task(config, *paths, "a card", starts.get(name)).save(folder / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        failure = run_group(Group("parallel_fits", folder.resolve(), size, is_heard=True))
    assert failure is None, "\n".join(failure.problems)
    return {name: found(folder / name) for name in configs}


def found(folder: Path) -> Found:
    logged = [metrics for metrics, _ in Metrics(folder).news()]
    return Found([one["train/loss"] for one in logged], [one["train/grad_norm"] for one in logged], folder / "model")


class OnCpu(FSDPStrategy):
    """Lightning refuses the older FSDP on CPUs, where it runs all the same."""


def deal_to_first(lengths: Sequence[int], world: int, limits: Limits) -> list[list[np.ndarray]]:
    """The first device reads all, the others have only idle micro-batches."""
    (parts,) = deal(lengths, 1, limits)
    return [parts, *[[part[:0] for part in parts]] * (world - 1)]


def fit_one(handover: Path) -> None:
    sampler.deal = deal_to_first if handover.name.endswith(IDLE) else deal
    train(Task.load(handover), handover)


def main(folder: Path) -> None:
    parallel.FSDPStrategy = OnCpu
    fit.check_devices = lambda settings: None
    torch.nn.Module.compile = partialmethod(torch.nn.Module.compile, backend="aot_eager")  # kernels would take minutes
    handovers = sorted(file.parent for file in folder.glob("*/task.json"))
    size = int(os.environ["WORLD_SIZE"])
    take_part(folder, size, lambda: [fit_one(one) for one in handovers])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
