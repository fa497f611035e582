"""Fair timings: ours and a reference on the same inputs in one run, printed with their ratio and kept as JSON."""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from fusion.dialogues.dialogue import Dialogue, read_jsonl

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "numpy", "numba", "transformers", "tokenizers", "rapidfuzz")


@dataclass(frozen=True)
class Row:
    """One comparison; smaller is better for times and sizes."""

    name: str
    reference: float | None
    """None: there is nothing to compare with, the number stands for itself."""
    ours: float
    unit: str

    @property
    def ratio(self) -> float | None:
        """How many times smaller ours is."""
        return None if self.reference is None else self.reference / self.ours


class Inputs(NamedTuple):
    pivot: Any
    """Tokeniser."""
    source: Any
    """Tokeniser."""
    dialogues: list[Dialogue]
    origin: str
    """What these are, for the record."""

    @property
    def texts(self) -> list[str]:
        """The messages of every dialogue, one below the other."""
        return ["\n".join(message.content for message in one.messages) for one in self.dialogues]


def seconds(call: Callable[[], object], repeats: int = 5, clock: Callable[[], float] = time.perf_counter) -> float:
    """The shortest of `repeats` runs: what the machine can do when nothing else disturbs it.

    With `time.thread_time` as the clock, waiting for a core that others use does not count: for calls on one thread.
    """
    best = float("inf")
    for _ in range(repeats):
        started = clock()
        call()
        best = min(best, clock() - started)
    return best


def interleaved(
    reference: Callable[[], object],
    ours: Callable[[], object],
    rounds: int = 2,
    repeats: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[float, float]:
    """The shortest runs of a slow reference and of ours, which runs before and after it: both meet the same noise."""
    best_reference, best_ours = float("inf"), seconds(ours, repeats, clock)
    for _ in range(rounds):
        best_reference = min(best_reference, seconds(reference, 1, clock))
        best_ours = min(best_ours, seconds(ours, repeats, clock))
    return best_reference, best_ours


def turns(
    calls: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], np.ndarray]
) -> dict[str, np.ndarray]:
    """All times of calls that run one after the other, `rounds` times: all meet the same noise, which shows.

    `clock` may read several clocks at once: [clocks]. The times of a call are [rounds, clocks].
    """
    took: dict[str, list[np.ndarray]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            started = clock()
            call()
            took[name].append(clock() - started)
    return {name: np.stack(times) for name, times in took.items()}


def inputs(folder: Path) -> Inputs:
    """Mistral-32k, Qwen-151k and GSM8K dialogues below `folder`, or small tokenisers and texts made on the spot."""
    if (folder / "tokenizers").is_dir():
        from transformers import AutoTokenizer

        pair = [AutoTokenizer.from_pretrained(folder / "tokenizers" / name) for name in ("mistral-32k", "qwen-151k")]
        dialogues = read_jsonl(folder / "data/gsm8k_dialogues.jsonl")
        return Inputs(*pair, dialogues, "Mistral-32k, Qwen-151k, GSM8K dialogues")
    return _made_inputs()


def _made_inputs() -> Inputs:
    from fusion.config.world import PIVOT, WorldConfig
    from fusion.world.corpora import Split, fusion_corpus
    from fusion.world.tokenizers import make_tokenizer

    world = WorldConfig()
    pair = [make_tokenizer(model, world) for model in (PIVOT, world.sources[0])]
    dialogues = fusion_corpus(Split.TRAIN, world)
    return Inputs(*pair, dialogues, f"tokenisers and dialogues of the world, made on the spot ({world.sources[0]})")


def parser(description: str) -> argparse.ArgumentParser:
    """Options that every benchmark has."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--data", type=Path, default=Path("../shared"), help="folder with tokenizers/ and data/")
    options.add_argument("--out", type=Path, default=None, help="JSON file; default: results/<name>.json")
    return options


def report(title: str, rows: Sequence[Row], out: Path, **facts: object) -> None:
    """Print reference, ours and ratio, and write them with the versions to `out`."""
    table = Table(title=title)
    for heading in ("", "reference", "ours", "ratio", "unit"):
        table.add_column(heading, justify="left" if heading in ("", "unit") else "right")
    for row in rows:
        numbers = [_short(row.reference), _short(row.ours), "" if row.ratio is None else _times(row.ratio)]
        table.add_row(row.name, *numbers, row.unit)
    Console().print(table)
    record = {
        "title": title,
        "rows": [{**asdict(row), "ratio": row.ratio} for row in rows],
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "processor": platform.processor() or platform.machine(),
        "busy": {"load_average": os.getloadavg(), "processors": os.cpu_count()},
        **facts,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=2) + "\n", "utf-8")


def _short(number: float | None) -> str:
    return "" if number is None else f"{number:,.4g}"


def _times(ratio: float) -> str:
    return f"{ratio:,.{1 if ratio >= 10 else 2}f}x"
