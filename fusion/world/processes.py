"""The models of a world, trained in processes of their own.

One thread each makes the result independent of the machine's number of cores; a process each keeps that setting, and
the global random state that transformers initialises weights from, out of the caller's.
"""

import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from fusion.config.world import WorldConfig

log = logging.getLogger(__name__)

PACKAGE_ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def train_models(config: WorldConfig, folder: Path, names: Sequence[str], num_workers: int) -> None:
    """Train every model of `names` that `folder` does not have yet, `num_workers` at a time, and show how far it is.

    Raises:
        RuntimeError: a training process failed; its traceback is on the standard error stream.
    """
    missing = [name for name in names if not (folder / "models" / name).is_dir()]
    shares = _shares(config, missing, num_workers)
    console = Console(stderr=True)
    progress = Progress(
        TextColumn("world {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    with progress, ThreadPoolExecutor(max(1, len(shares))) as pool:
        tasks = {name: progress.add_task(name, total=config.models[name].steps) for name in missing}
        running = [pool.submit(_follow, folder, share, progress, tasks) for share in shares]
        for follower in running:
            follower.result()


def _shares(config: WorldConfig, names: Sequence[str], num_workers: int) -> list[list[str]]:
    """Deal the models to the workers, the longest training first, always to the worker with the least to do."""
    shares: list[list[str]] = [[] for _ in range(num_workers)]
    for name in sorted(names, key=lambda name: -config.models[name].steps):
        min(shares, key=lambda share: sum(config.models[other].steps for other in share)).append(name)
    return [share for share in shares if share]


def _follow(folder: Path, names: Sequence[str], progress: Progress, tasks: dict[str, TaskID]) -> None:
    """Run one worker to its end; it reports lines of `name finished_steps`."""
    path = os.pathsep.join(filter(None, (str(PACKAGE_ROOT), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "fusion.world.worker", str(folder), *names]
    log.info("world: training %s", ", ".join(names))
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,  # never written to: it closes when this process dies, and the worker follows
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | ENVIRONMENT | {"PYTHONPATH": path},
    ) as worker:
        assert worker.stdout is not None
        for line in worker.stdout:
            name, step = line.split()
            progress.update(tasks[name], completed=int(step))
            if int(step) == progress.tasks[tasks[name]].total:
                log.info("world: %s is trained", name)
        if worker.wait():
            raise RuntimeError(f"world: the process that trains {', '.join(names)} ended with {worker.returncode}")
