"""`python -m fusion.teaching.inspect STORE`: what is in a distribution store, what it takes, and whether it is sound.

Array legend: R rows, K candidates.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fusion.config import EXIT_USER_ERROR, UserError
from fusion.config.schema import ModelConfig
from fusion.teaching import shards
from fusion.teaching.store import DistributionStore
from fusion.teaching.teacher_rows import TeacherRows

EXIT_DAMAGED = 1
LOG_WIDTH = 100  # where the output is a file and has no width of its own
SHOWN_CANDIDATES = 5


@dataclass
class Sums:
    """Sums over all rows of a store."""

    rows: int = 0
    candidates: int = 0
    tail: float = 0.0
    entropy: float = 0.0
    nll: float = 0.0

    def add(self, rows: TeacherRows) -> None:
        logprobs_RK = np.where(rows.ids_RK >= 0, rows.logprobs_RK, 0).astype(np.float64)
        masses_RK = np.where(rows.ids_RK >= 0, np.exp(logprobs_RK), 0)
        tail_R = rows.tail_R.astype(np.float64)
        tail_entropy_R = -tail_R * np.log(np.where(tail_R > 0, tail_R, 1))
        self.rows += len(rows.nll_R)
        self.candidates += int(rows.counts_R.sum())
        self.tail += float(tail_R.sum())
        self.entropy += float(tail_entropy_R.sum() - (masses_RK * logprobs_RK).sum())
        self.nll += rows.total_nll


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what the store holds; exit code 0 when it is sound, 1 when it is damaged, 2 when there is none."""
    parser = argparse.ArgumentParser(prog="python -m fusion.teaching.inspect", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="STORE", help="a folder cache/teaching/FINGERPRINT")
    parser.add_argument("--rows", type=int, default=5, metavar="N", help="decoded rows to show (default: 5)")
    parser.add_argument("--tokenizer", metavar="PATH", help="folder or hub id: show the tokens too")
    options = parser.parse_args(arguments)
    console = Console()
    console = console if console.is_terminal else Console(width=LOG_WIDTH)
    try:
        _check_folder(options.folder)
        name_of = _names(options.tokenizer)
        problems = shards.verify(options.folder)
        if not problems:
            _print_store(console, DistributionStore.open(options.folder), options.rows, name_of)
    except UserError as error:
        print("\n".join(error.problems), file=sys.stderr)
        return EXIT_USER_ERROR
    if problems:
        print("\n".join(problems), file=sys.stderr)
        return EXIT_DAMAGED
    console.print("sound: every checksum is right", highlight=False)
    return 0


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give that of a distribution store (cache/teaching/FINGERPRINT)")
    if not (folder / shards.INDEX).is_file() and not any(folder.glob("shard-*.safetensors")):
        raise UserError(
            f"{folder}: there is no distribution store in this folder (cache/teaching/FINGERPRINT has one)"
        )


def _names(tokenizer: str | None) -> Callable[[int], str]:
    """How candidates are written: their ids, with a tokeniser their text too."""
    if tokenizer is None:
        return str
    from fusion.dialogues.tokenizer import load_tokenizer  # loads transformers, which takes seconds

    loaded = load_tokenizer(ModelConfig(name="--tokenizer", path=tokenizer))
    return lambda token: f"{token} {loaded.decode([token])!r}" if token < len(loaded) else f"{token} (unknown)"


def _print_store(console: Console, store: DistributionStore, num_shown: int, name_of: Callable[[int], str]) -> None:
    sums = Sums()
    shown: list[tuple[str, TeacherRows]] = []
    left = num_shown
    for content_hash in store:
        rows = store[content_hash]
        sums.add(rows)
        if left > 0:
            shown.append((content_hash, rows))
            left -= len(rows.nll_R)
    console.print(_facts(store, sums), _sizes(store, sums.rows))
    if num_shown > 0:
        console.print(_decoded(shown, num_shown, name_of))


def _facts(store: DistributionStore, sums: Sums) -> Table:
    table = Table(title=str(store.folder), box=SIMPLE, show_header=False)
    table.add_column("what", no_wrap=True)
    table.add_column("value", overflow="fold")
    facts = {
        **dict(sorted(store.description.items())),
        "dialogues": f"{len(store):,}",
        "rows": f"{sums.rows:,}",
        "bytes per row": f"{store.num_bytes / sums.rows:.2f}",
        "candidates per row": f"{sums.candidates / sums.rows:.2f}",
        "tail mass": f"{sums.tail / sums.rows:.4f}",
        "entropy (nats, the tail as one token)": f"{sums.entropy / sums.rows:.4f}",
        "NLL of the references (nats per token)": f"{sums.nll / sums.rows:.4f}",
    }
    for key, value in facts.items():
        table.add_row(Text(key), Text(str(value)))
    return table


def _sizes(store: DistributionStore, num_rows: int) -> Table:
    table = Table("column", box=SIMPLE)
    for heading in ("bytes", "bytes per row", "share"):
        table.add_column(heading, justify="right")
    for name, size in store.parts().items():
        table.add_row(name, f"{size:,}", f"{size / num_rows:.2f}", f"{size / store.num_bytes:.1%}")
    table.add_section()
    table.add_row("all", f"{store.num_bytes:,}", f"{store.num_bytes / num_rows:.2f}", "100.0%")
    return table


def _decoded(shown: Sequence[tuple[str, TeacherRows]], num_shown: int, name_of: Callable[[int], str]) -> Table:
    table = Table("dialogue", box=SIMPLE)
    for heading in ("row", "tail", "NLL"):
        table.add_column(heading, justify="right")
    table.add_column("candidates and their probabilities", overflow="fold")
    lines = [
        (content_hash[:8] if row == 0 else "", rows, row)
        for content_hash, rows in shown
        for row in range(len(rows.nll_R))
    ]
    for name, rows, row in lines[:num_shown]:
        count = int(rows.counts_R[row])
        candidates = [
            f"{name_of(int(token))} {np.exp(logprob):.3f}"
            for token, logprob in zip(rows.ids_RK[row, :count], rows.logprobs_RK[row, :count], strict=True)
        ]
        more = [f"and {count - SHOWN_CANDIDATES} more"] if count > SHOWN_CANDIDATES else []
        text = Text("  ".join(candidates[:SHOWN_CANDIDATES] + more))
        table.add_row(name, str(row), f"{rows.tail_R[row]:.4f}", f"{rows.nll_R[row]:.4f}", text)
    return table


if __name__ == "__main__":
    sys.exit(main())
