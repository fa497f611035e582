"""Checkpoints as folders `checkpoints/step-000500`, each whole or not there:

shard-*.safetensors  weights and optimiser, every process its own part (`fusion.training.sharded_state`)
random-RANK.json     generators of random numbers of every process
state.json           where the run stood, and the settings that decide where it goes
manifest.json        bytes and SHA-256 of the other files

They are written under a hidden name, flushed and renamed, and older ones go afterwards.
"""

import json
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fusion.cache import file_hash, fsync_tree, write_json
from fusion.config import UserError, raise_problems

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
"""Their place in the folder of a job."""
MANIFEST, STATE = "manifest.json", "state.json"
HASHING_THREADS = 8


@dataclass(frozen=True)
class RunState:
    """Where a run stands between two optimiser steps."""

    step: int
    """Optimiser steps that are done."""
    world: int
    """Processes that train."""
    seconds: float
    """Training so far, that of earlier attempts included."""
    metrics: dict[str, float]
    """Last logged ones."""
    schedule: dict[str, Any]
    """State of the learning rate's schedule."""
    settings: dict[str, Any]
    """What decides the result, by dotted name."""


NOTHING_DONE = RunState(0, 1, 0.0, {}, {}, {})


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    state: RunState

    @classmethod
    def read(cls, folder: Path) -> "Checkpoint":
        """A checkpoint that is known to be whole."""
        return cls(folder, RunState(**json.loads((folder / STATE).read_text("utf-8"))))


class Digest(NamedTuple):
    """What a file is known by."""

    bytes: int
    sha256: str


def find_checkpoint(resume: str, folder: Path, settings: Mapping[str, Any]) -> Checkpoint | None:
    """The checkpoint to go on from, whole and of these `settings`; None: the run begins at its beginning.

    Args:
        resume: `auto` takes the newest usable one in `folder` and logs why newer ones are not; `never`; or the folder
            of one that has to be usable.

    Raises:
        UserError: the demanded one is not usable, with everything that speaks against it.
    """
    if resume == "never":
        return None
    if resume != "auto":
        return _open(Path(resume), settings)
    for candidate in _newest_first(folder):
        try:
            found = _open(candidate, settings)
        except UserError as error:
            log.warning("not resumed: %s", "; ".join(error.problems))
        else:
            log.info("going on behind step %d, from %s", found.state.step, candidate)
            return found
    return None


def _open(folder: Path, settings: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint in `folder`; settings are compared before gigabytes are read."""
    if not folder.is_dir():
        raise UserError(f"there is no checkpoint {folder}")
    digests = _read_manifest(folder)
    raise_problems([f"checkpoint {folder} is damaged: {one}" for one in _misfits(folder, digests)])
    try:
        found = Checkpoint.read(folder)
    except (ValueError, TypeError) as error:
        raise UserError(f"checkpoint {folder} is damaged: {STATE} cannot be read ({error})") from error
    raise_problems([f"checkpoint {folder} has other settings: {one}" for one in _differences(found, settings)])
    now = digest_files(folder, digests)
    spoilt = [name for name, digest in digests.items() if now[name] != digest]
    raise_problems([f"checkpoint {folder} is damaged: the content of {name} has changed" for name in spoilt])
    return found


def _read_manifest(folder: Path) -> dict[str, Digest]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        return {name: Digest(**digest) for name, digest in manifest["files"].items()}
    except FileNotFoundError as error:
        inside = ", ".join(str(one) for one in _newest_first(folder) or _newest_first(folder / CHECKPOINTS))
        hint = f"; there are {inside}" if inside else ""
        raise UserError(f"{folder} is no whole checkpoint: it has no {MANIFEST}{hint}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"checkpoint {folder} is damaged: {MANIFEST} cannot be read ({error})") from error


def _misfits(folder: Path, digests: Mapping[str, Digest]) -> Iterator[str]:
    """What can be seen without reading: a stray shard would be loaded with the others."""
    for name, digest in digests.items():
        path = folder / name
        if not path.is_file():
            yield f"{name} is missing"
        elif path.stat().st_size != digest.bytes:
            yield f"{name} has {path.stat().st_size} bytes instead of {digest.bytes}"
    strangers = {path.name for path in folder.iterdir()} - digests.keys() - {MANIFEST}
    yield from (f"{name} does not belong to it" for name in sorted(strangers))


def _differences(found: Checkpoint, settings: Mapping[str, Any]) -> Iterator[str]:
    theirs = found.state.settings
    for name in sorted(theirs.keys() | settings.keys()):
        there, here = (json.dumps(one.get(name), ensure_ascii=False) for one in (theirs, settings))
        if there != here:
            yield f"{name} is {there} there and {here} here"


def _newest_first(folder: Path) -> list[Path]:
    """Folders of checkpoints; whether they are whole is another question."""
    found = {path: path.name.removeprefix("step-") for path in folder.glob("step-*") if path.is_dir()}
    return sorted((path for path in found if found[path].isdigit()), key=lambda path: -int(found[path]))


def digest_files(folder: Path, names: Iterable[str]) -> dict[str, Digest]:
    """Read the named files of `folder` through, several at a time."""
    paths = {name: folder / name for name in names}
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        hashes = pool.map(file_hash, paths.values())
        return {
            name: Digest(path.stat().st_size, sha256)
            for (name, path), sha256 in zip(paths.items(), hashes, strict=True)
        }


def begin(folder: Path, step: int) -> Path:
    """An empty hidden folder for a checkpoint of `step`."""
    working = folder / f".step-{step:06d}.writing"
    shutil.rmtree(working, ignore_errors=True)
    working.mkdir(parents=True)
    return working


def publish(working: Path, state: RunState, digests: Mapping[str, Digest], keep: int) -> Path:
    """Let the checkpoint in `working` appear, whose files have `digests`. Behind it `keep - 1` older ones of the same
    run stay; all others go."""
    write_json(working / STATE, asdict(state))
    files = {**digests, **digest_files(working, [STATE])}
    write_json(working / MANIFEST, {"files": {name: digest._asdict() for name, digest in files.items()}})
    fsync_tree(working)
    folder = working.parent / f"step-{state.step:06d}"
    _remove(folder)  # of an attempt that was not resumed
    working.rename(folder)
    fsync_tree(working.parent)
    older = [one for one in _newest_first(working.parent) if _is_older(one, state)][: keep - 1]
    for other in {*_newest_first(working.parent)} - {folder, *older}:
        _remove(other)
    return folder


def _is_older(folder: Path, state: RunState) -> bool:
    try:
        found = Checkpoint.read(folder)
    except (OSError, ValueError, TypeError):
        return False
    return found.state.step < state.step and found.state.settings == state.settings


def _remove(folder: Path) -> None:
    """A kill in here leaves nothing that looks like a checkpoint."""
    if folder.is_dir():
        doomed = folder.with_name(f".{folder.name}.removed")
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed)


def clear_unfinished(folder: Path) -> None:
    """Delete what killed writes have left."""
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover)


def discard_checkpoints(job_folder: Path) -> None:
    """A finished job does not need them: its model is its result."""
    shutil.rmtree(job_folder / CHECKPOINTS, ignore_errors=True)
