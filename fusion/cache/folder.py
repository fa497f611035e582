"""One finished folder per fingerprint: `cache/<stage>/<fingerprint>`."""

import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from filelock import FileLock

from fusion.cache.atomic import fsync_tree, write_text
from fusion.cache.fingerprint import canonical_json, fingerprint

log = logging.getLogger(__name__)

KEY_FILE = "key.json"


def cached_folder(root: Path, stage: str, key: Mapping[str, object], build: Callable[[Path], None]) -> Path:
    """Return the folder `root/stage/<fingerprint of key>`, calling `build(folder)` when it is not there yet.

    `build` fills a folder under a temporary name that becomes visible, flushed, only when `build` returned. The
    temporary folder outlives a kill, so a build that writes finished shards finds them on the next call. A second
    process that wants the same folder waits for the first.
    """
    name = fingerprint(key)
    folder, working = root / stage / name, root / stage / f".{name}.building"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{name}.lock"):
        if folder.is_dir():
            return folder
        log.info("%s: building %s", stage, name)
        working.mkdir(exist_ok=True)
        for torn in working.rglob(".*.tmp"):  # of a write that was killed
            torn.unlink()
        build(working)
        write_text(working / KEY_FILE, canonical_json(key))
        fsync_tree(working)
        working.rename(folder)
    return folder


def discard_unfinished(root: Path) -> int:
    """Delete what killed builds left below `root`; return how many folders went."""
    leftovers = list(root.glob("*/.*.building"))
    for leftover in leftovers:
        shutil.rmtree(leftover)
    return len(leftovers)
