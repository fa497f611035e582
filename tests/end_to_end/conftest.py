"""The main job once, on the smoke world, through the real commands; the tests look at what it left."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PATIENCE = 3600
"""Seconds that a command may take, on the slowest machine."""
METHODS = ("linear", "task_arithmetic", "ties", "dare_linear", "varm", "sce")


@dataclass(frozen=True)
class Workplace:
    """A folder with a cache and runs of its own, in which commands are run as a user would."""

    root: Path

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    def run(self, entry, *arguments, code=0, **environment):
        """Run `python entry.py arguments` and return its output; asserts the exit code."""
        command = [sys.executable, str(REPOSITORY / f"{entry}.py"), *arguments]
        done = subprocess.run(
            command,
            cwd=self.root,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "WANDB_SILENT": "true", **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert done.returncode == code, f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout + done.stderr


@pytest.fixture(scope="session")
def workplace(tmp_path_factory):
    """The sweep over the three sources has run here before anything else, so its cached stages can be counted."""
    workplace = Workplace(tmp_path_factory.mktemp("workplace"))
    workplace.run("train", "-m", "world=smoke", "source=tiny_a,tiny_b,tiny_c", "hydra.sweep.dir=runs/targets")
    stages = {stage.name: len(list(stage.glob("[!.]*"))) for stage in workplace.cache.iterdir()}
    (workplace.root / "stages_of_the_sweep.json").write_text(json.dumps(stages))
    return workplace


@pytest.fixture(scope="session")
def targets(workplace):
    """Folder of the sweep over the three sources."""
    return workplace.runs / "targets"


@pytest.fixture(scope="session")
def sft(workplace, targets):
    workplace.run("train", "world=smoke", "objective=sft", "hydra.run.dir=runs/sft")
    return workplace.runs / "sft"


@pytest.fixture(scope="session")
def merges(workplace, targets, sft):
    """Folder of the sweep over merge methods, with the searched scale."""
    workplace.run("merge", "-m", f"merge={','.join(METHODS)}", "merge.scale=search", "hydra.sweep.dir=runs/merges")
    return workplace.runs / "merges"
