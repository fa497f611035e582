"""Fair timings: ours and a reference on the same inputs in one run, printed with their ratio and kept as JSON."""

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

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
    texts: list[str]
    origin: str
    """What these are, for the record."""


def seconds(call: Callable[[], object], repeats: int = 5) -> float:
    """The shortest of `repeats` runs: what the machine can do when nothing else disturbs it."""
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - started)
    return best


def inputs(folder: Path) -> Inputs:
    """Mistral-32k, Qwen-151k and GSM8K dialogues below `folder`, or small tokenisers and texts made on the spot."""
    if (folder / "tokenizers").is_dir():
        from transformers import AutoTokenizer

        pair = [AutoTokenizer.from_pretrained(folder / "tokenizers" / name) for name in ("mistral-32k", "qwen-151k")]
        lines = (folder / "data/gsm8k_dialogues.jsonl").read_text("utf-8").splitlines()
        messages = [json.loads(line)["messages"] for line in lines]
        texts = ["\n".join(message["content"] for message in dialogue) for dialogue in messages]
        return Inputs(*pair, texts, "Mistral-32k, Qwen-151k, GSM8K dialogues")
    return _made_inputs()


def _made_inputs() -> Inputs:
    from fusion.config.world import WorldConfig  # noqa: F401  (the world's corpora and tokenisers)

    raise SystemExit("no real tokenisers: give --data FOLDER with tokenizers/ and data/")


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
        numbers = [_short(row.reference), _short(row.ours), "" if row.ratio is None else f"{row.ratio:,.1f}x"]
        table.add_row(row.name, *numbers, row.unit)
    Console().print(table)
    record = {
        "title": title,
        "rows": [{**asdict(row), "ratio": row.ratio} for row in rows],
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "processor": platform.processor() or platform.machine(),
        **facts,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=2) + "\n", "utf-8")


def _short(number: float | None) -> str:
    return "" if number is None else f"{number:,.4g}"
