"""SIGTERM to the real command: it ends with a checkpoint and a line that goes on, and that line finishes the job."""

import csv
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

from .conftest import PATIENCE, REPOSITORY

SETTINGS = (
    *("world=smoke", "evaluation=none", "parallel=fsdp", "parallel.accelerator=cpu"),
    *("trainer.epochs=6", "trainer.log_every_steps=1", "trainer.checkpoint_every_steps=10"),
)


ATTEMPTS = 5
"""A machine may be too busy to look at the job before its last step."""


def told_to_end(workplace, job):
    """Start a job and send it a SIGTERM when its first checkpoint is there; return its output, or None where it was
    done by then."""
    command = [sys.executable, str(REPOSITORY / "train.py"), *SETTINGS, f'hydra.run.dir="{job}"']
    with subprocess.Popen(
        command,
        cwd=workplace.root,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        deadline = time.monotonic() + PATIENCE
        while not any((job / "checkpoints").glob("step-*")) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=PATIENCE)
    if process.returncode == 0 or (job / "checkpoints" / "step-000048").is_dir():
        shutil.rmtree(job)
        return None
    assert process.returncode == 143, output[-3000:]
    return output


def result(job):
    return json.loads((job / "result.json").read_text())


def test_a_job_of_two_processes_that_is_told_to_end(workplace, targets):
    job = workplace.root / "told" / "source=tiny_a,seed=0"  # a name as those of sweeps
    outputs = (told_to_end(workplace, job) for _ in range(ATTEMPTS))
    output = next(one for one in outputs if one is not None)
    *_, told, line = output.splitlines()
    (checkpoint,) = (job / "checkpoints").iterdir()
    step = int(checkpoint.name.removeprefix("step-"))
    assert told.startswith(f"told to end (SIGTERM) after step {step} of 48; its checkpoint is in ")
    assert result(job)["status"] == "failed"
    python, entry, *arguments = shlex.split(line.removeprefix("it goes on with: "))
    assert (python, entry) == ("python", "train.py")
    output = workplace.run("train", *arguments)
    assert f"going on behind step {step}, from" in output
    assert result(job)["status"] == "finished"
    assert result(job)["steps"] == 48
    with (job / "csv" / "metrics.csv").open() as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == list(range(48))
    assert not (job / "checkpoints").exists()
