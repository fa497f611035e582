"""Files appear whole or not at all, whatever moment the process is killed."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` under a temporary name, flush it to the disk, and rename it to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Mapping[str, object] | Sequence[object]) -> None:
    """JSON with sorted keys, so that equal values are equal bytes."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def fsync_tree(folder: Path) -> None:
    """Flush every file and folder below `folder`: a rename is only a promise once its content is on the disk."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
