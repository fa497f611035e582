"""What happens when the last job of a sweep has ended: its comparison."""

import shlex
import sys
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig


class SweepComparison(Callback):
    """Hydra calls this after a multirun: print the table, write the comparison page into the sweep's folder."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        compare_folder(Path(config.hydra.sweep.dir), sweep_command())


def sweep_command() -> str:
    """The line that made the whole sweep."""
    return shlex.join(["python", *sys.argv])


def compare_folder(folder: Path, command: str) -> None:
    """Compare the jobs at or below `folder`, in the terminal and on a page."""
    from fusion.tracking.comparison import read_runs, read_traces, write_comparison
    from fusion.tracking.terminal import print_table

    rows, failures = read_runs([folder])
    for failure in failures:
        print(f"failed: {failure.job}: {failure.reason}")
    if not rows:
        return
    print_table(rows)
    traces = read_traces([folder], rows)
    pages = write_comparison(folder, rows, title=folder.name, command=command, failures=failures, traces=traces)
    print("comparison: " + "  ".join(map(str, pages)))
