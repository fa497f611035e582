"""Dialogues from files and the hub, through `datasets`: validated, normalised, split; all bad rows named at once."""

import hashlib
import json
import logging
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

from fusion.config import UserError, raise_problems
from fusion.config.schema import DataConfig
from fusion.dialogues.dialogue import ROLES, Dialogue, Message
from fusion.dialogues.forms import Row, as_messages, mended

log = logging.getLogger(__name__)

SHOWN_PROBLEMS = 20
JSON_LINES = (".jsonl", ".json")
ARRAY_START = b"["
FILE_KINDS = (*JSON_LINES, ".parquet")
HALF_CHARACTER = re.compile("[\ud800-\udfff]")


def load_dialogues(
    path: str, split: str = "train", limit: int | None = None, *, form: str = "auto", clean: bool = False
) -> list[Dialogue]:
    """Read dialogues from a JSON, JSONL or Parquet file, a dataset folder, or the hub.

    `form` is that of `as_messages`. `clean` mends rows, and leaves out those that it cannot mend. Contents are
    normalised to NFC before any tokeniser sees them, so that no tokeniser changes bytes on its own.

    Raises:
        UserError: the file is missing, empty or malformed, or rows are not dialogues; all bad rows in one message.
    """
    dialogues: list[Dialogue] = []
    problems: list[str] = []
    dropped = 0
    for number, raw in islice(_numbered_rows(path, split), limit):
        row, found = _read_row(raw, form, clean)
        if found and clean:
            dropped += 1
        elif found:
            problems += [f"{path}, row {number}: {problem}" for problem in found]
        else:
            dialogues.append(_normalised(row))
    if dropped:
        log.warning("%s: %d rows are left out, which have no answer or cannot be read", path, dropped)
    if not dialogues and not problems:
        reason = f": data.clean left out all {dropped} rows" if dropped else "; it needs one per line or row"
        problems = [f"{path}: the file holds no dialogues{reason}"]
    if len(problems) > SHOWN_PROBLEMS:
        hidden = len(problems) - SHOWN_PROBLEMS
        problems = [*problems[:SHOWN_PROBLEMS], f"{path}: and {hidden} more rows with problems"]
    raise_problems(problems)
    return dialogues


def _read_row(raw: Row | str, form: str, clean: bool) -> tuple[Row, list[str]]:
    """A row in `messages` form, and what is wrong with it."""
    row = raw if isinstance(raw, str) else as_messages(raw, form)
    if isinstance(row, str):
        return {}, [row]
    row = mended(row) if clean else row
    return row, _row_problems(row)


def load_splits(data: DataConfig) -> tuple[list[Dialogue], list[Dialogue]]:
    """Training and held-out dialogues; the held-out ones are drawn by content hash unless they have a file.

    What is held out is never trained on: a dialogue of both files counts as held out.
    """
    train = load_dialogues(data.path, data.split, data.limit, form=data.form, clean=data.clean)
    if data.heldout_path:
        heldout = load_dialogues(data.heldout_path, data.split, form=data.form, clean=data.clean)
        names = {dialogue.content_hash for dialogue in heldout}
        return [dialogue for dialogue in train if dialogue.content_hash not in names], heldout
    heldout = [dialogue for dialogue in train if _draw(dialogue) < data.heldout_fraction]
    return [dialogue for dialogue in train if _draw(dialogue) >= data.heldout_fraction], heldout


def _draw(dialogue: Dialogue) -> float:
    digest = hashlib.sha256(f"heldout:{dialogue.content_hash}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _numbered_rows(path: str, split: str) -> Iterator[tuple[int, Row | str]]:
    """Rows with their numbers (lines of a JSONL file); a text instead of a row says what is wrong with it."""
    local = Path(path)
    if local.suffix in FILE_KINDS and not local.is_file():
        raise UserError(f"{path}: no such file; data.path takes a JSONL or Parquet file, a dataset folder or a hub id")
    if local.suffix in JSON_LINES:
        return _json_rows(local)
    return enumerate(_dataset_rows(path, split), start=1)


def _dataset_rows(path: str, split: str) -> Iterable[Row]:
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


def _json_rows(path: Path) -> Iterator[tuple[int, Row | str]]:
    """Read here, not by the builder of `datasets`: that takes texts for dates and fails on keys that come late."""
    with path.open("rb") as file:
        if path.suffix == ".json" and file.read(1) == ARRAY_START:
            yield from _array_rows(path)
            return
        file.seek(0)
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, _parsed(line)


def _array_rows(path: Path) -> Iterator[tuple[int, Row | str]]:
    """Rows of one array over a whole file, as ShareGPT and Alpaca are published."""
    try:
        rows = json.loads(path.read_text("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON ({error.msg}, line {error.lineno}, column {error.colno})") from error
    for number, row in enumerate(rows, start=1):
        yield number, row if isinstance(row, dict) else "a row must be an object with `messages`"


def _parsed(line: bytes) -> Row | str:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return f"not UTF-8 text ({error.reason} at byte {error.start}); save the file as UTF-8"
    except json.JSONDecodeError as error:
        return f"not JSON ({error.msg}, column {error.colno}); write one object per line"
    return value if isinstance(value, dict) else "a row must be an object with `messages`"


def _row_problems(row: Row) -> list[str]:
    messages = row.get("messages")
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        return [
            'no `messages`; a dialogue is {"messages": [{"role": ..., "content": ...}, ...]} '
            "(data.form: also ShareGPT's and Alpaca's)"
        ]
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


def _normalised(row: Row) -> Dialogue:
    dialogue = Dialogue.from_json(row)
    messages = tuple(Message(m.role, unicodedata.normalize("NFC", m.content)) for m in dialogue.messages)
    return Dialogue(messages, dialogue.category)
