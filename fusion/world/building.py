"""The models of a world, trained side by side: one process and one thread each, so the machine decides no bit."""

import logging
import multiprocessing
import os
import shutil
import time
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing.sharedctypes import SynchronizedArray
from pathlib import Path
from random import Random

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from fusion.cache import fsync_tree
from fusion.config.world import PIVOT, WorldConfig

log = logging.getLogger(__name__)

POLL_SECONDS = 0.3
_finished_steps: "SynchronizedArray[int] | None" = None


def build_models(config: WorldConfig, folder: Path) -> None:
    """Train every model of `config` that `folder` does not have yet; each appears there when it is finished."""
    names = [name for name in (PIVOT, *config.sources) if not (folder / name).is_dir()]
    if not names:
        return
    context = multiprocessing.get_context("spawn")
    steps = context.Array("i", len(names))
    workers = min(len(names), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(steps,)) as pool:
        # The longest first, so that no worker is left alone with it at the end.
        order = sorted(range(len(names)), key=lambda place: -config.models[names[place]].steps)
        jobs = {place: pool.submit(_build_model, names[place], place, config, folder) for place in order}
        _watch(names, [jobs[place] for place in range(len(names))], steps, config)


def _watch(names: list[str], jobs: list["Future[None]"], steps: "SynchronizedArray[int]", config: WorldConfig) -> None:
    """Show progress until all jobs have ended; raises what a job raised."""
    console = Console(stderr=True)
    columns = (TextColumn("world: training {task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bars = [progress.add_task(name, total=config.models[name].steps) for name in names]
        reported: set[int] = set()
        while len(reported) < len(jobs):
            time.sleep(POLL_SECONDS)
            for place, (bar, job) in enumerate(zip(bars, jobs, strict=True)):
                progress.update(bar, completed=steps[place])
                if job.done() and place not in reported:
                    job.result()
                    reported.add(place)
                    log.info("world: %s is trained (%d of %d models)", names[place], len(reported), len(jobs))


def _start_worker(steps: "SynchronizedArray[int]") -> None:
    import torch

    global _finished_steps
    _finished_steps = steps
    torch.set_num_threads(1)


def _build_model(name: str, place: int, config: WorldConfig, folder: Path) -> None:
    from fusion.dialogues.encode import Encoder
    from fusion.dialogues.template import chat_format
    from fusion.world.corpora import model_corpus
    from fusion.world.models import make_model
    from fusion.world.tokenizers import make_tokenizer
    from fusion.world.training import train

    tokenizer = make_tokenizer(name, config)
    own = chat_format(tokenizer, name)
    pivot = own if name == PIVOT else chat_format(make_tokenizer(PIVOT, config), PIVOT)
    native, shared = Encoder(own), Encoder(own, pivot)
    rng = Random(f"{config.seed}/templates/{name}")
    examples = [
        (shared if rng.random() < config.shared_template_share else native).encode(dialogue)
        for dialogue in model_corpus(name, config)
    ]
    model = make_model(config.models[name], tokenizer, config.initializer_range, config.seed)
    train(
        model, examples, config.models[name], config, f"{config.seed}/{name}/order", lambda step: _report(place, step)
    )
    writing = folder / f".{name}.writing"
    shutil.rmtree(writing, ignore_errors=True)
    model.save_pretrained(writing)
    tokenizer.save_pretrained(writing)
    fsync_tree(writing)
    writing.rename(folder / name)


def _report(place: int, step: int) -> None:
    assert _finished_steps is not None
    _finished_steps[place] = step
