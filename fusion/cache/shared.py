"""A stage's folder that several processes fill together, piece by piece; it appears when its last piece is there.

Every piece has a lock beside the folder, which the system takes back from a process that dies. So nobody waits for the
dead, a piece is made by one process at a time, and only what a killed process held is made again.
"""

import logging
import shutil
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from fusion.cache.folder import Places, publish
from fusion.cache.users import note_use

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Pieces:
    """What a shared folder is made of. Pieces are numbered from 0; the bytes of each depend on its number alone."""

    count: int
    is_there: Callable[[Path, int], bool]
    """Whether a piece is in the folder, whole: pieces appear by a rename."""
    make: Callable[[Path, Iterator[list[int]]], None]
    """Makes the pieces of every list that it takes from the iterator before it takes the next: they are locked until
    then. Takes nothing when nothing is missing."""
    finish: Callable[[Path], None]
    """Writes what stands over all pieces, once they are there; alone."""
    at_once: int = 1
    """The most pieces in one list."""


def shared_folder(root: Path, stage: str, key: Mapping[str, object], pieces: Pieces) -> Path:
    """Return the folder `root/stage/<fingerprint of key>`, making what is missing beside others that do the same.

    Pieces that somebody else makes are waited for. As with `cached_folder` the folder is seen only when it is
    finished, and a build that was killed goes on with the pieces that it had.
    """
    folder = make_share(root, stage, key, pieces, range(pieces.count))
    assert folder is not None, "every piece was asked for"
    return folder


def make_share(root: Path, stage: str, key: Mapping[str, object], pieces: Pieces, share: Sequence[int]) -> Path | None:
    """Make the missing pieces of `share`; the finished folder, or None while pieces of other shares are missing."""
    places = Places.of(root, stage, key)
    folder, working = places.folder, places.working
    note_use(folder)
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(places.lock):
        if folder.is_dir():
            return folder
        working.mkdir(exist_ok=True)
    log.info("%s: building %s", stage, folder.name)
    with closing(_claims(places, pieces, share)) as claims:  # an error must not keep the locks
        pieces.make(working, claims)
    with FileLock(places.lock):
        if folder.is_dir():
            return folder
        if not all(pieces.is_there(working, number) for number in range(pieces.count)):
            return None
        pieces.finish(working)
        publish(places, key)
    shutil.rmtree(places.piece_locks, ignore_errors=True)  # whoever takes one now sees that the folder is there
    return folder


def _claims(places: Places, pieces: Pieces, share: Sequence[int]) -> Generator[list[int], None, None]:
    """Missing pieces of `share`, locked; ends when none is missing. Waits only while it holds nothing."""
    missing = [number for number in share if not pieces.is_there(places.working, number)]
    while missing:
        with ExitStack() as held:
            mine: list[int] = []
            for number in missing:
                if len(mine) < pieces.at_once and _locked(held, places, number, wait=False):
                    mine.append(number)
            if not mine and _locked(held, places, missing[0], wait=True):
                mine = missing[:1]
            # Looked at under the locks, and before the folder: pieces also vanish from here when it is finished.
            mine = [number for number in mine if not pieces.is_there(places.working, number)]
            if places.folder.is_dir():
                return
            if mine:
                yield mine
        missing = [number for number in missing if not pieces.is_there(places.working, number)]


def _locked(held: ExitStack, places: Places, number: int, wait: bool) -> bool:
    """Whether piece `number` could be locked until `held` ends."""
    lock = FileLock(places.piece_locks / f"{number}.lock")
    try:
        lock.acquire(blocking=wait, poll_interval=POLL_SECONDS)
    except (Timeout, FileNotFoundError):  # somebody has it, or the locks went because the folder is finished
        return False
    held.callback(lock.release)
    return True
