"""A dialogue: what every model of the experiment reads."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Message:
    role: str
    """Who speaks: system, user or assistant."""
    content: str
    """What is said, as plain text."""


@dataclass(frozen=True)
class Dialogue:
    """Messages in order; `content_hash` is its name everywhere, never its row number."""

    messages: tuple[Message, ...]
    category: str = ""
    """What kind of dialogue it is (a skill, a subject); scores are reported per category."""

    @cached_property
    def content_hash(self) -> str:
        """32 hex digits of the SHA-256 over the messages (the category is not content)."""
        plain = [[message.role, message.content] for message in self.messages]
        return hashlib.sha256(json.dumps(plain, ensure_ascii=False).encode("utf-8")).hexdigest()[:32]

    def to_json(self) -> dict[str, object]:
        messages = [{"role": message.role, "content": message.content} for message in self.messages]
        return {"messages": messages, **({"category": self.category} if self.category else {})}

    @classmethod
    def from_json(cls, row: Mapping[str, object]) -> "Dialogue":
        messages = row["messages"]
        assert isinstance(messages, Iterable)
        return cls(
            messages=tuple(Message(str(message["role"]), str(message["content"])) for message in messages),
            category=str(row.get("category") or ""),
        )


def chat(*turns: str, category: str = "") -> Dialogue:
    """A dialogue from alternating user and assistant turns."""
    roles = ("user", "assistant")
    return Dialogue(tuple(Message(roles[i % 2], turn) for i, turn in enumerate(turns)), category)


def write_jsonl(path: Path, dialogues: Iterable[Dialogue]) -> None:
    """One dialogue per line in the `messages` form that `read_jsonl` and `datasets` read."""
    from fusion.cache import write_text

    write_text(path, "".join(json.dumps(dialogue.to_json(), ensure_ascii=False) + "\n" for dialogue in dialogues))


def read_jsonl(path: Path) -> list[Dialogue]:
    """Read a file that `write_jsonl` wrote (the user's own files go through `load`, which validates)."""
    lines = path.read_text("utf-8").split("\n")  # not splitlines(): JSON leaves U+2028 and U+0085 as they are
    return [Dialogue.from_json(json.loads(line)) for line in lines if line]
