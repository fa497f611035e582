"""Who uses what of a cache: every job notes the stages that it read or made, so that nobody deletes them."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from fusion.cache.atomic import write_json
from fusion.cache.fingerprint import fingerprint

NOTES = ".users"
RESULT = "result.json"
_used: dict[Path, None] = {}
"""Stages that this process has read or made since its job began, in order."""
_jobs: list[Path] = []
"""The folder of the job in progress, where there is one."""


def note_use(folder: Path) -> None:
    """The job in progress needs this stage, and says so at once: it may go on for days."""
    folder = folder.resolve()
    is_new = folder not in _used
    _used[folder] = None
    if is_new and _jobs:
        record_uses(_jobs[0])


def begin_uses(job: Path | None = None) -> None:
    """A new job begins in this process; without its folder its stages are noted when `record_uses` is called."""
    _used.clear()
    _jobs[:] = [job] if job else []


def end_uses(job: Path) -> None:
    """What is used from now on is not for `job`."""
    if job in _jobs:
        _jobs.clear()


def record_uses(job: Path) -> None:
    """Leave the notes of `job`, in every cache that it used; an earlier attempt's stages stay noted."""
    for root in {folder.parent.parent for folder in _used}:
        mine = [f"{folder.parent.name}/{folder.name}" for folder in _used if folder.parent.parent == root]
        file = root / NOTES / f"{fingerprint({'job': str(job.resolve())})}.json"
        write_json(file, {"job": str(job.resolve()), "stages": sorted({*mine, *_read(file).stages})})


@dataclass(frozen=True)
class _Note:
    job: str = ""
    stages: list[str] = field(default_factory=list)


def users(root: Path) -> dict[str, list[Path]]:
    """`stage/name` -> the folders of jobs that use it, of those that are still there."""
    found: dict[str, list[Path]] = {}
    for file in sorted((root / NOTES).glob("*.json")):
        note = _read(file)
        if note.job and (Path(note.job) / RESULT).is_file():
            for stage in note.stages:
                found.setdefault(stage, []).append(Path(note.job))
    return found


def _read(file: Path) -> _Note:
    try:
        return _Note(**json.loads(file.read_text("utf-8")))
    except (OSError, ValueError, TypeError):  # none yet, or damaged
        return _Note()
