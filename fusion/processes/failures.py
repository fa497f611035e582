"""Why one of several processes that work together has ended, told in a file that their starter reads."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fusion.cache import write_json
from fusion.config import EXIT_USER_ERROR

EXIT_TERMINATED = 143
"""Exit status of who ends because of a SIGTERM, as shells count it: 128 + 15."""


class Terminated(SystemExit):
    """The job was told to end (SIGTERM), and does; the message says what is left of its work."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.code = EXIT_TERMINATED


@dataclass(frozen=True)
class Failure:
    status: int
    """Exit status."""
    problems: list[str]
    """The user's mistakes, or the last lines of what was said."""

    @property
    def is_of_user(self) -> bool:
        return self.status == EXIT_USER_ERROR

    @property
    def is_wanted(self) -> bool:
        """Whether somebody told the processes to end."""
        return self.status == EXIT_TERMINATED


def save_failure(handover: Path, rank: int, failure: Failure) -> None:
    """Leave word of why process `rank` ends."""
    write_json(handover / f"failure-{rank}.json", asdict(failure))


def saved_failures(handover: Path) -> dict[int, Failure]:
    """What the processes have left so far, by rank, the first one that ended first."""
    files = sorted(handover.glob("failure-*.json"), key=lambda path: (path.stat().st_mtime_ns, path.name))
    return {int(file.stem.rpartition("-")[2]): Failure(**json.loads(file.read_text("utf-8"))) for file in files}


def read_failures(handover: Path, last_lines: Sequence[str], status: int) -> Failure | None:
    """Why processes ended with `status`, in the words of the first one that failed: the others failed because it was
    gone. A process that was killed has left only a line of torchrun's."""
    if status == 0:
        return None
    killed = [line.strip() for line in last_lines if "Signal " in line and "SIGTERM" not in line]
    if killed:
        return Failure(1, killed)
    failures = list(saved_failures(handover).values())
    told = [one for one in failures if one.is_of_user] or failures
    return told[0] if told else Failure(1, list(last_lines))
