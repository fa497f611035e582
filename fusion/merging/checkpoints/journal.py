"""What of a merge is finished and safe on the disk, so that a killed merge goes on where it was."""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from fusion.cache import write_text
from fusion.merging.statistics import TensorRecord

JOURNAL_FILE = ".journal"


@dataclass(frozen=True)
class Journal:
    """A first line that names the merge, then one line of JSON per finished tensor."""

    path: Path
    records: dict[str, TensorRecord]

    @classmethod
    def begin(cls, folder: Path, key: str) -> "Journal":
        """A new journal of the merge called `key`."""
        path = folder / JOURNAL_FILE
        write_text(path, f"{key}\n")
        return cls(path, {})

    @classmethod
    def resume(cls, folder: Path, key: str) -> "Journal | None":
        """The journal in `folder`, if there is one of the merge called `key`. A line that was torn by a kill goes."""
        path = folder / JOURNAL_FILE
        if not path.is_file():
            return None
        head, *lines = path.read_bytes().split(b"\n")[:-1] or [b""]
        if head.decode("utf-8", "replace") != key:
            return None
        records = [TensorRecord(**json.loads(line)) for line in lines]
        os.truncate(path, sum(len(line) + 1 for line in (head, *lines)))
        return cls(path, {record.name: record for record in records})

    def append(self, records: Iterable[TensorRecord]) -> None:
        """Add tensors whose bytes are on the disk; returns when the lines are, too."""
        with self.path.open("ab") as file:
            for record in records:
                file.write(json.dumps(asdict(record)).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
