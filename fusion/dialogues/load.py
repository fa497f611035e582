"""Dialogues from files and the hub, through `datasets`: validated, normalised, split; all bad rows named at once."""

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from fusion.config import UserError
from fusion.config.schema import DataConfig
from fusion.dialogues.dialogue import ROLES, Dialogue, Message

SHOWN_PROBLEMS = 20
FILE_LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def load_dialogues(path: str, split: str = "train", limit: int | None = None) -> list[Dialogue]:
    """Read dialogues in `messages` form from a JSONL or Parquet file, a dataset folder, or the hub.

    Contents are normalised to NFC before any tokeniser sees them, so that no tokeniser changes bytes on its own.

    Raises:
        UserError: the file is missing, empty or malformed, or rows are not dialogues; all bad rows in one message.
    """
    rows = _read_rows(path, split, limit)
    dialogues: list[Dialogue] = []
    problems: list[str] = []
    for number, row in enumerate(rows, start=1):
        found = _row_problems(row)
        problems += [f"{path}, row {number}: {problem}" for problem in found]
        if not found:
            dialogues.append(_normalised(row))
    if not dialogues and not problems:
        problems = [f"{path}: the file holds no dialogues"]
    if len(problems) > SHOWN_PROBLEMS:
        hidden = len(problems) - SHOWN_PROBLEMS
        problems = [*problems[:SHOWN_PROBLEMS], f"{path}: and {hidden} more rows with problems"]
    if problems:
        raise UserError(problems)
    return dialogues


def load_splits(data: DataConfig) -> tuple[list[Dialogue], list[Dialogue]]:
    """Training and held-out dialogues; the held-out ones are drawn by content hash unless they have a file."""
    train = load_dialogues(data.path, data.split, data.limit)
    if data.heldout_path:
        return train, load_dialogues(data.heldout_path, data.split)
    heldout = [dialogue for dialogue in train if _draw(dialogue) < data.heldout_fraction]
    return [dialogue for dialogue in train if _draw(dialogue) >= data.heldout_fraction], heldout


def _draw(dialogue: Dialogue) -> float:
    digest = hashlib.sha256(f"heldout:{dialogue.content_hash}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _read_rows(path: str, split: str, limit: int | None) -> Iterable[Mapping[str, object]]:
    import datasets

    datasets.disable_progress_bars()
    local = Path(path)
    loader = FILE_LOADERS.get(local.suffix)
    if loader and not local.is_file():
        raise UserError(f"{path}: no such file; data.path takes a JSONL or Parquet file, a dataset folder or a hub id")
    if loader == "json":
        _check_json(local)
    try:
        if loader:
            dataset = datasets.load_dataset(loader, data_files=str(local), split="train")
        elif (local / "state.json").is_file():
            dataset = datasets.load_from_disk(str(local))
        else:
            dataset = datasets.load_dataset(path, split=split)
    except Exception as error:  # the builders raise many kinds; each is the user's input
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: the dialogues cannot be read: {reason}") from error
    return dataset.select(range(min(limit, len(dataset)))) if limit is not None else dataset


def _check_json(path: Path) -> None:
    """Name the malformed lines of a JSONL file; the builder's own message does not."""
    problems = []
    with path.open(encoding="utf-8", errors="strict") as file:
        try:
            for number, line in enumerate(file, start=1):
                problems += _line_problems(path, number, line)
        except UnicodeDecodeError as error:
            problems.append(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8")
    if path.stat().st_size == 0:
        problems.append(f"{path}: the file is empty; it needs one dialogue per line")
    if problems:
        raise UserError(problems[:SHOWN_PROBLEMS])


def _line_problems(path: Path, number: int, line: str) -> list[str]:
    if not line.strip():
        return []
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        return [f"{path}, row {number}: not JSON ({error.msg}, column {error.colno}); write one object per line"]
    return [] if isinstance(value, dict) else [f"{path}, row {number}: a row must be an object with `messages`"]


def _row_problems(row: Mapping[str, object]) -> list[str]:
    messages = row.get("messages")
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        return ['no `messages`; a dialogue is {"messages": [{"role": ..., "content": ...}, ...]}']
    problems = []
    for number, message in enumerate(messages, start=1):
        role, content = (message.get("role"), message.get("content")) if isinstance(message, Mapping) else (None, None)
        if role not in ROLES:
            problems.append(f"message {number} has the unknown role {role!r}; roles are {', '.join(ROLES)}")
        if not isinstance(content, str):
            problems.append(f"message {number} has no text in `content`")
        elif role == "assistant" and not content.strip():
            problems.append(f"message {number} is an empty assistant turn")
    if not problems and not any(message["role"] == "assistant" for message in messages):
        problems.append("no assistant turn, so there is nothing to learn from")
    return problems


def _normalised(row: Mapping[str, object]) -> Dialogue:
    dialogue = Dialogue.from_json(row)
    messages = tuple(Message(m.role, unicodedata.normalize("NFC", m.content)) for m in dialogue.messages)
    return Dialogue(messages, dialogue.category)
