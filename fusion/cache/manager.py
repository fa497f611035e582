"""What lies in a cache, and what of it may go: nothing that a job still refers to, unless that is asked for."""

import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from fusion.cache.users import RESULT, users

TOLD = (RESULT, "lineage.json", "config.yaml")
"""Files of a job that may name stages."""
DAY = 86_400.0


@dataclass(frozen=True)
class Stage:
    """One folder of a cache."""

    path: Path
    num_bytes: int
    age_days: float
    is_finished: bool
    """False: a build that was killed, or is in progress."""
    users: tuple[Path, ...]
    """Folders of jobs that refer to it."""

    @property
    def kind(self) -> str:
        return self.path.parent.name

    @property
    def name(self) -> str:
        return self.path.name.removeprefix(".").removesuffix(".building")

    @property
    def lock(self) -> Path:
        return self.path.parent / f".{self.name}.lock"


def stages(root: Path, runs: Iterable[Path] = ()) -> list[Stage]:
    """Everything in the cache, by kind and size; jobs below `runs` count as users of all that their records name."""
    noted = users(root)
    texts = dict(_records(runs))
    found = []
    for path in sorted([*root.glob("[!.]*/[!.]*/"), *root.glob("[!.]*/.*.building/")]):
        is_finished = not path.name.startswith(".")
        named = [job for job, text in texts.items() if is_finished and f"{path.parent.name}/{path.name}" in text]
        who = tuple(dict.fromkeys([*noted.get(f"{path.parent.name}/{path.name}", []), *named]))
        files = [file.stat() for file in path.rglob("*") if file.is_file()]
        newest = max([path.stat().st_mtime, *(file.st_mtime for file in files)])
        size = sum(file.st_size for file in files)
        found.append(Stage(path, size, max(0.0, time.time() - newest) / DAY, is_finished, who))
    return sorted(found, key=lambda stage: (stage.kind, -stage.num_bytes, stage.name))


def _records(runs: Iterable[Path]) -> Iterator[tuple[Path, str]]:
    for folder in runs:
        for result in sorted(folder.resolve().rglob(RESULT)):
            files = [result.parent / name for name in TOLD]
            yield result.parent, "\n".join(file.read_text("utf-8", "replace") for file in files if file.is_file())


def prunable(found: Iterable[Stage], *, older_than_days: float, kinds: Iterable[str], used_too: bool) -> list[Stage]:
    """Stages that may go: of these kinds (all when none is named), old enough, and used by no job."""
    wanted = set(kinds)
    return [
        stage
        for stage in found
        if (not wanted or stage.kind in wanted) and stage.age_days >= older_than_days and (used_too or not stage.users)
    ]


def prune(stage: Stage) -> bool:
    """Delete a stage; False where somebody builds it just now. It vanishes at once, then its bytes go."""
    try:
        with FileLock(stage.lock, timeout=0):
            going = stage.path.with_name(f".{stage.name}.going")
            shutil.rmtree(going, ignore_errors=True)
            stage.path.rename(going)
            shutil.rmtree(going)
            shutil.rmtree(stage.path.parent / f".{stage.name}.locks", ignore_errors=True)
    except Timeout:
        return False
    return True
