"""Rows in the forms that public datasets have, as `messages`; and what is mended in rows of the wild."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = Mapping[str, object]
SPEAKERS = {
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "system": "system",
}
"""ShareGPT's names of the roles."""
ALPACA_KEYS = {"instruction", "output"}


def as_messages(row: Row, form: str = "auto") -> Row | str:
    """`row` with `messages`, whatever its form; a text instead says why it has not that form.

    `form` is messages, sharegpt, alpaca, or auto, which looks at the keys of the row.
    """
    if form == "auto":
        form = _form_of(row)
    return READERS[form](row)


def _form_of(row: Row) -> str:
    if "messages" in row:
        return "messages"
    if "conversations" in row:
        return "sharegpt"
    return "alpaca" if row.keys() >= ALPACA_KEYS else "messages"


def _plain(row: Row) -> Row:
    return row


def _sharegpt(row: Row) -> Row | str:
    turns = row.get("conversations")
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not all(isinstance(one, Mapping) for one in turns):
        return 'no `conversations`; ShareGPT\'s form is {"conversations": [{"from": "human", "value": ...}, ...]}'
    system = row.get("system")
    first = [{"role": "system", "content": system}] if isinstance(system, str) and system.strip() else []
    return {**row, "messages": first + [_message(turn) for turn in turns]}


def _message(turn: Mapping[str, Any]) -> dict[str, object]:
    speaker = turn.get("from", turn.get("role"))
    role = SPEAKERS.get(speaker, speaker) if isinstance(speaker, str) else speaker
    return {"role": role, "content": turn.get("value", turn.get("content"))}


def _alpaca(row: Row) -> Row | str:
    missing = sorted(ALPACA_KEYS - row.keys())
    if missing:
        return f'no `{missing[0]}`; Alpaca\'s form is {{"instruction": ..., "input": ..., "output": ...}}'
    parts = [row["instruction"], row.get("input")]
    question = "\n\n".join(part for part in parts if isinstance(part, str) and part.strip())
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]
    system = row.get("system")
    if isinstance(system, str) and system.strip():
        messages.insert(0, {"role": "system", "content": system})
    return {**row, "messages": messages}


READERS: dict[str, Callable[[Row], Row | str]] = {"messages": _plain, "sharegpt": _sharegpt, "alpaca": _alpaca}


def mended(row: Row) -> Row:
    """`row` without what is no dialogue in its `messages`; none are left where there is no answer.

    What stands before the first user turn goes, but for a system message at the very start; so does everything from
    the first turn on that is empty, has an unknown speaker or repeats the one before; and what follows the last
    answer.
    """
    messages = row.get("messages")
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        return row
    kept: list[Mapping[str, object]] = []
    for message in messages:
        role, content = (message.get("role"), message.get("content")) if isinstance(message, Mapping) else (None, None)
        is_first_word = not kept or kept[-1]["role"] == "system"
        if role == "system" and not kept and isinstance(content, str):
            if content.strip():
                kept.append(message)
            continue
        if role == "assistant" and is_first_word:
            continue
        expected = "user" if is_first_word or kept[-1]["role"] == "assistant" else "assistant"
        if role != expected or not isinstance(content, str) or not content.strip():
            break
        kept.append(message)
    while kept and kept[-1]["role"] != "assistant":
        kept.pop()
    return {**row, "messages": kept}
