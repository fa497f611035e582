"""A hidden folder beside the output, which becomes the output by one rename when everything in it is complete."""

import os
import shutil
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from fusion.cache import fsync_tree
from fusion.config import UserError
from fusion.merging.checkpoints.journal import JOURNAL_FILE

LOCK_FILE = ".lock"
PROBE_FILE = ".probe"
PROBE_BYTES = 64 << 20
LEAST_PROBE_BYTES = 16 << 20


def working_folder(out: Path) -> Path:
    return out.with_name(f".{out.name}.merging")


@contextmanager
def unfinished(out: Path) -> Iterator[Path]:
    """The working folder of `out`, with what a killed merge has left in it; it becomes `out` when the block ends well.

    Mistakes of the user leave nothing. Everything else (a kill, Ctrl-C, a full disk) leaves the folder, and the same
    merge goes on with it.

    Raises:
        UserError: another process is merging into `out`.
    """
    working = working_folder(out)
    working.mkdir(parents=True, exist_ok=True)
    lock = FileLock(working / LOCK_FILE, blocking=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise UserError(f"{out}: another process is merging into it: wait for it, or choose another name") from error
    try:
        yield working
        fsync_tree(working)
        working.rename(out)
        _flush_folder(out.parent)
        for name in (JOURNAL_FILE, LOCK_FILE):
            (out / name).unlink(missing_ok=True)
    except UserError:
        shutil.rmtree(working, ignore_errors=True)
        raise
    finally:
        lock.release()


def clear(working: Path, keep: Collection[str] = ()) -> None:
    """Remove what an earlier attempt has left, but for the files named."""
    for path in working.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in (LOCK_FILE, *keep):
            path.unlink()


def space_problems(outs: Sequence[Path], num_bytes: int) -> list[str]:
    """A problem when `num_bytes` for each of `outs`, which share a disk, do not fit on it.

    Killed merges may hold some of it already.
    """
    held = sum(
        path.stat().st_blocks * 512 for out in outs for path in working_folder(out).rglob("*") if path.is_file()
    )
    existing = next(folder for folder in outs[0].parents if folder.is_dir())
    free = shutil.disk_usage(existing).free
    if len(outs) * num_bytes <= free + held:
        return []
    models = "the merged model takes" if len(outs) == 1 else f"{len(outs)} merged models take"
    return [
        f"{outs[0]}: {models} {len(outs) * num_bytes / 1e9:,.1f} GB, but {free / 1e9:,.1f} GB are free on that disk: "
        "free some, or choose another"
    ]


def measured_copy_speed(source: Path, working: Path) -> float | None:
    """Bytes read and written per second by a plain copy of a little of `source`; None for small files."""
    num_bytes = min(source.stat().st_size, PROBE_BYTES)
    if num_bytes < LEAST_PROBE_BYTES:
        return None
    probe = working / PROBE_FILE
    piece = memoryview(bytearray(1 << 20))
    started = time.perf_counter()
    with source.open("rb", buffering=0) as reading, probe.open("wb", buffering=0) as writing:
        for _ in range(num_bytes // len(piece)):
            writing.write(piece[: reading.readinto(piece)])
    seconds = time.perf_counter() - started
    probe.unlink()
    return 2 * (num_bytes // len(piece) * len(piece)) / seconds


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
