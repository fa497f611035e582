"""SHA-256 of files, remembered from process to process for as long as a file is left alone, as git's index does.

What must tell whether bytes are what they were (`fusion.merging.verify`, the shards of a store) asks `file_hash`.
"""

import hashlib
import json
import os
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

NOTES = ".digests.jsonl"
LEAST_BYTES = 1 << 20
"""Smaller files are hashed faster than looked up."""
SETTLED_NS = 2_000_000_000
"""A file that changed less than this ago may change again without another time stamp."""


class FileState(NamedTuple):
    """What a file system says of a file; some of it changes when somebody writes to it, or puts another in place."""

    path: str
    num_bytes: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> "FileState":
        state = path.stat()
        return cls(str(path.resolve()), state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino)

    @property
    def written(self) -> tuple[str, int, int]:
        """Without what also changes when a file is only linked, or gets other permissions."""
        return self[:3]


_known: dict[FileState, str] = {}
_notes: list[Path] = []
_lock = threading.Lock()


def keep_digests(root: Path) -> None:
    """From now on, read and write the notes in the cache `root`."""
    file = root.resolve() / NOTES
    with _lock:
        if file not in _notes:
            _notes[:] = [file]
            _known.update(_noted(file))


def known_digest(state: FileState) -> str | None:
    return _known.get(state)


def remember(state: FileState, digest: str) -> None:
    """`state` was taken before `digest`; nothing is remembered if the file is in another one by now."""
    if FileState.of(Path(state.path)) != state:
        return
    with _lock:
        _known[state] = digest
        settled = time.time_ns() - max(state.mtime_ns, state.ctime_ns) > SETTLED_NS
        if _notes and settled and state.num_bytes >= LEAST_BYTES:
            _note(_notes[0], json.dumps([*state, digest]))


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remembered_hashes(paths: Iterable[Path]) -> list[str]:
    """`file_hash` of each, several at a time; of those that were left alone since then as it was."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)), "hash") as pool:
        return list(pool.map(_remembered_hash, paths))


def _remembered_hash(path: Path) -> str:
    state = FileState.of(path)
    digest = known_digest(state)
    if digest is None:
        digest = file_hash(path)
        remember(state, digest)
    return digest


def _noted(file: Path) -> dict[FileState, str]:
    """What is in the notes; a line that was torn by a kill says nothing."""
    found = {}
    for line in file.read_text("utf-8", "replace").splitlines() if file.is_file() else []:
        try:
            *state, digest = json.loads(line)
            found[FileState(*state)] = str(digest)
        except (ValueError, TypeError):
            continue
    return found


def _note(file: Path, line: str) -> None:
    """One write behind the end, so that lines of several processes do not mix.

    A cache that is read-only or full stays as it is: no job fails for a note.
    """
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("ab", buffering=0) as notes:
            notes.write(f"{line}\n".encode())
