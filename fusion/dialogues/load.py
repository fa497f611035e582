"""Dialogues from files and the hub, through `datasets`: validated, normalised, split; all bad rows named at once."""

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import cast

from fusion.config import UserError
from fusion.config.schema import DataConfig
from fusion.dialogues.dialogue import ROLES, Dialogue, Message

SHOWN_PROBLEMS = 20
JSON_LINES = (".jsonl", ".json")
FILE_KINDS = (*JSON_LINES, ".parquet")
HALF_CHARACTER = re.compile("[\ud800-\udfff]")


def load_dialogues(path: str, split: str = "train", limit: int | None = None) -> list[Dialogue]:
    """Read dialogues in `messages` form from a JSONL or Parquet file, a dataset folder, or the hub.

    Contents are normalised to NFC before any tokeniser sees them, so that no tokeniser changes bytes on its own.

    Raises:
        UserError: the file is missing, empty or malformed, or rows are not dialogues; all bad rows in one message.
    """
    dialogues: list[Dialogue] = []
    problems: list[str] = []
    for number, row in islice(_numbered_rows(path, split), limit):
        found = [row] if isinstance(row, str) else _row_problems(row)
        problems += [f"{path}, row {number}: {problem}" for problem in found]
        if not found:
            dialogues.append(_normalised(cast(Mapping[str, object], row)))
    if not dialogues and not problems:
        problems = [f"{path}: the file holds no dialogues; it needs one per line or row"]
    if len(problems) > SHOWN_PROBLEMS:
        hidden = len(problems) - SHOWN_PROBLEMS
        problems = [*problems[:SHOWN_PROBLEMS], f"{path}: and {hidden} more rows with problems"]
    if problems:
        raise UserError(problems)
    return dialogues


def load_splits(data: DataConfig) -> tuple[list[Dialogue], list[Dialogue]]:
    """Training and held-out dialogues; the held-out ones are drawn by content hash unless they have a file.

    What is held out is never trained on: a dialogue of both files counts as held out.
    """
    train = load_dialogues(data.path, data.split, data.limit)
    if data.heldout_path:
        heldout = load_dialogues(data.heldout_path, data.split)
        names = {dialogue.content_hash for dialogue in heldout}
        return [dialogue for dialogue in train if dialogue.content_hash not in names], heldout
    heldout = [dialogue for dialogue in train if _draw(dialogue) < data.heldout_fraction]
    return [dialogue for dialogue in train if _draw(dialogue) >= data.heldout_fraction], heldout


def _draw(dialogue: Dialogue) -> float:
    digest = hashlib.sha256(f"heldout:{dialogue.content_hash}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _numbered_rows(path: str, split: str) -> Iterator[tuple[int, Mapping[str, object] | str]]:
    """Rows with their numbers (lines of a JSONL file); a text instead of a row says what is wrong with it."""
    local = Path(path)
    if local.suffix in FILE_KINDS and not local.is_file():
        raise UserError(f"{path}: no such file; data.path takes a JSONL or Parquet file, a dataset folder or a hub id")
    if local.suffix in JSON_LINES:
        return _json_rows(local)
    return enumerate(_dataset_rows(path, split), start=1)


def _dataset_rows(path: str, split: str) -> Iterable[Mapping[str, object]]:
    import datasets

    datasets.disable_progress_bars()
    local = Path(path)
    try:
        if local.suffix in FILE_KINDS:
            return datasets.load_dataset("parquet", data_files=str(local), split="train")
        if (local / "state.json").is_file():
            return datasets.load_from_disk(str(local))
        return datasets.load_dataset(path, split=split)
    except Exception as error:  # the builders raise many kinds; each is the user's input
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: the dialogues cannot be read: {reason}") from error


def _json_rows(path: Path) -> Iterator[tuple[int, Mapping[str, object] | str]]:
    """Read here, not by the builder of `datasets`: that takes texts for dates and fails on keys that come late."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, _parsed(line)


def _parsed(line: bytes) -> Mapping[str, object] | str:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return f"not UTF-8 text ({error.reason} at byte {error.start}); save the file as UTF-8"
    except json.JSONDecodeError as error:
        return f"not JSON ({error.msg}, column {error.colno}); write one object per line"
    return value if isinstance(value, dict) else "a row must be an object with `messages`"


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
        elif HALF_CHARACTER.search(content):
            problems.append(f"message {number} has half a surrogate pair, which no UTF-8 text can hold")
        elif role == "assistant" and not content.strip():
            problems.append(f"message {number} is an empty assistant turn")
    if not problems and not any(message["role"] == "assistant" for message in messages):
        problems.append("no assistant turn, so there is nothing to learn from")
    return problems


def _normalised(row: Mapping[str, object]) -> Dialogue:
    dialogue = Dialogue.from_json(row)
    messages = tuple(Message(m.role, unicodedata.normalize("NFC", m.content)) for m in dialogue.messages)
    return Dialogue(messages, dialogue.category)
