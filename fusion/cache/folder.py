"""One finished folder per fingerprint: `cache/<stage>/<fingerprint>`."""

import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock

from fusion.cache.atomic import fsync_tree, write_text
from fusion.cache.fingerprint import canonical_json, fingerprint
from fusion.cache.users import note_use

log = logging.getLogger(__name__)

KEY_FILE = "key.json"


class Places(NamedTuple):
    """Where a folder is built, locked and found."""

    folder: Path
    working: Path
    """It has this name until it is finished."""
    lock: Path
    piece_locks: Path

    @classmethod
    def of(cls, root: Path, stage: str, key: Mapping[str, object]) -> "Places":
        parent, name = root / stage, fingerprint(key)
        return cls(parent / name, parent / f".{name}.building", parent / f".{name}.lock", parent / f".{name}.locks")


def cached_folder(root: Path, stage: str, key: Mapping[str, object], build: Callable[[Path], None]) -> Path:
    """Return the folder `root/stage/<fingerprint of key>`, calling `build(folder)` when it is not there yet.

    `build` fills a folder under a temporary name that becomes visible, flushed, only when `build` returned. The
    temporary folder outlives a kill, so a build that writes finished shards finds them on the next call. A second
    process that wants the same folder waits for the first.
    """
    places = Places.of(root, stage, key)
    folder, working = places.folder, places.working
    note_use(folder)
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(places.lock):
        if folder.is_dir():
            return folder
        log.info("%s: building %s", stage, folder.name)
        working.mkdir(exist_ok=True)
        _delete_torn(working)
        build(working)
        publish(places, key)
    return folder


def publish(places: Places, key: Mapping[str, object]) -> None:
    """Let the finished working folder appear, flushed, under its own name. The caller holds its lock."""
    _delete_torn(places.working)
    write_text(places.working / KEY_FILE, canonical_json(key))
    fsync_tree(places.working)
    places.working.rename(places.folder)


def _delete_torn(working: Path) -> None:
    """Delete what killed writes have left."""
    for torn in working.rglob(".*.tmp"):
        torn.unlink()


def discard_unfinished(root: Path) -> int:
    """Delete what killed builds left below `root`; return how many folders went."""
    leftovers = list(root.glob("*/.*.building"))
    for leftover in leftovers:
        shutil.rmtree(leftover)
    for locks in root.glob("*/.*.locks"):
        shutil.rmtree(locks)
    return len(leftovers)
