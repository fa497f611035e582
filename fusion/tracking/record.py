"""The record of a job: settings, command, lineage and result, in plain files of its own folder."""

import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from fusion.cache import begin_uses, canonical_json, end_uses, record_uses, write_json, write_text
from fusion.config import UserError
from fusion.config.launch import Job

PACKAGES = (
    "torch",
    "pytorch-lightning",
    "transformers",
    "datasets",
    "hydra-core",
    "omegaconf",
    "safetensors",
    "numpy",
)
RESULT, LINEAGE = "result.json", "lineage.json"
LOCK = ".lock"


@dataclass
class RunRecord:
    """Writes what a job was and became. `result.json` says running, finished or failed, with the reason.

    While it is open no other process works in the job's folder; entering raises UserError when one does.
    """

    job: Job
    stage: str
    seed: int
    fingerprint: str
    timings: dict[str, float] = field(default_factory=dict)
    _clock: float = field(default_factory=time.perf_counter)
    _is_finished: bool = False

    def __enter__(self) -> "RunRecord":
        self._lock = self._locked()
        begin_uses(self.job.folder)
        write_text(self.job.folder / "config.yaml", self.job.config_yaml)
        write_text(self.job.folder / "command.txt", self.job.command + "\n")
        self._write({"status": "running"})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not self._is_finished:  # a page that fails later takes nothing back
            self._write({"status": "failed", "reason": f"{type(error).__name__}: {error}"})
        end_uses(self.job.folder)
        self._lock.release()

    def _locked(self) -> FileLock:
        """The lock's file stays: who deletes it may take it from under a process that waits for it."""
        self.job.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.job.folder / LOCK, blocking=False)
        try:
            lock.acquire()
        except Timeout as error:
            problem = "another process is at this job: wait for it, or choose another folder (hydra.run.dir)"
            raise UserError(f"{self.job.folder}: {problem}") from error
        return lock

    def lap(self, name: str) -> None:
        """Book the seconds since the last lap under `name`."""
        now = time.perf_counter()
        self.timings[name] = round(self.timings.get(name, 0.0) + now - self._clock, 3)
        self._clock = now
        record_uses(self.job.folder)

    def finish(self, result: Mapping[str, object], lineage: Mapping[str, object]) -> None:
        write_json(self.job.folder / LINEAGE, _plain({**lineage, **self._origin()}))
        record_uses(self.job.folder)
        self._write({"status": "finished", "lineage": LINEAGE, **result})
        self._is_finished = True

    def _write(self, result: Mapping[str, object]) -> None:
        common = {
            "stage": self.stage,
            "seed": self.seed,
            "fingerprint": self.fingerprint,
            "command": self.job.command,
            "time": time.time(),
            "timings_s": self.timings,
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
        write_json(self.job.folder / RESULT, _plain({**common, **result}))

    def _origin(self) -> dict[str, object]:
        return {
            "command": self.job.command,
            "seed": self.seed,
            "config": self.job.config_yaml,
            "versions": versions(),
            "git_commit": _git_commit(),
        }


def versions() -> dict[str, str]:
    """Versions of Python, the platform, and the packages that can change a result."""
    found = {name: metadata.version(name) for name in PACKAGES}
    return {"python": sys.version.split()[0], "platform": platform.platform(), **found}


def is_finished(folder: Path, fingerprint: str) -> bool:
    """Whether `folder` holds a finished result of exactly these settings, inputs and code."""
    result = read_result(folder)
    return result.get("status") == "finished" and result.get("fingerprint") == fingerprint


def read_result(folder: Path) -> dict[str, Any]:
    """The job's `result.json`; empty when there is none, or when a kill left none that can be read."""
    try:
        result = json.loads((folder / RESULT).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return result if isinstance(result, dict) else {}


def _plain(value: Mapping[str, object]) -> dict[str, object]:
    """Plain values; NaN and infinities, which JSON does not have, become null."""
    return json.loads(canonical_json(value), parse_constant=lambda _: None)


def _git_commit() -> str | None:
    """Commit of the code, for a checkout; None for an installed package."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
