"""Dialogues as tokens: ids, the supervision mask, and byte ends that every tokeniser shares.

Tensor legend: N tokens of a dialogue, R supervised rows.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fusion.dialogues.dialogue import Dialogue, Message
from fusion.dialogues.template import ChatFormat, Rendering, UnrenderableDialogue
from fusion.dialogues.token_bytes import TokenBytes, offset_ends, token_bytes

UNKNOWN = -1


@dataclass(frozen=True)
class Encoded:
    """One dialogue as one model reads it."""

    ids_N: np.ndarray
    """int32 token ids."""
    supervised_N: np.ndarray
    """bool: this token is an assistant token or its end-of-turn, so the row before it is trained."""
    ends_N: np.ndarray
    """int64 byte end of every token in the coordinate of assistant contents: all assistant messages in a row, each
    followed by one unit for its end-of-turn. Template text has no width, so ends of different tokenisers *and* of
    different templates can be compared. -1 where no boundary is proven; such rows are never aligned."""
    num_bytes: int
    """Supervised bytes, one unit per end-of-turn included: the denominator of nats per byte."""
    exact: bool
    """False: the byte walk failed and the ends come from the tokeniser's character offsets."""

    @property
    def rows_R(self) -> np.ndarray:
        """Positions t whose row p(. | tokens 0..t) predicts a supervised token t+1."""
        return np.flatnonzero(self.supervised_N[1:])


class Encoder:
    """Encodes dialogues for one model.

    `template` renders (the pivot's format for the paper's shared template, the model's own for native); `own` is the
    model's own format: its end-of-turn token stands wherever the rendering ends an assistant turn.
    """

    def __init__(self, own: ChatFormat, template: ChatFormat | None = None, max_length: int | None = None) -> None:
        self.own = own
        self.template = template or own
        self.max_length = max_length
        self._bytes: TokenBytes = token_bytes(own.tokenizer)
        self._reserved = sorted(_reserved_strings(own) | _reserved_strings(self.template))

    def encode(self, dialogue: Dialogue) -> Encoded:
        """Raises UnrenderableDialogue when the template or the tokeniser cannot carry this dialogue."""
        _refuse_special_tokens(dialogue, self._reserved)
        rendering = self._in_own_tokens(self.template.render(dialogue))
        batch = self.own.tokenizer(rendering.text, add_special_tokens=False, return_offsets_mapping=True)
        ids = np.asarray(batch["input_ids"], dtype=np.int32)
        byte_of_char = _byte_offsets(rendering.text)
        text_ends = self._bytes.text_ends(ids, rendering.text.encode("utf-8"))
        exact = text_ends is not None
        if text_ends is None:
            starts, text_ends = byte_of_char[np.asarray(batch["offset_mapping"], dtype=np.int64).reshape(-1, 2).T]
        else:
            starts = np.concatenate(([0], text_ends[:-1]))
        supervised, ends = _supervise(ids, starts, text_ends, rendering, byte_of_char, self.own.end_of_turn_id)
        ids, supervised, ends = (array[: self.max_length] for array in (ids, supervised, ends))
        num_bytes = int(np.diff(ends)[supervised[1:]].clip(min=0).sum())
        if not exact:
            proven = offset_ends(batch["offset_mapping"], rendering.text)[: self.max_length] >= 0
            ends = np.where(proven, ends, UNKNOWN)
        encoded = Encoded(ids, supervised, ends, num_bytes, exact)
        if not encoded.rows_R.size:
            raise UnrenderableDialogue("no assistant token is left within max_length")
        return encoded

    def encode_prompt(self, messages: Sequence[Message]) -> np.ndarray:
        """int32 [N]: what the model reads before it answers the last of `messages`; nothing is cut.

        Raises UnrenderableDialogue when the template or the tokeniser cannot carry them.
        """
        _refuse_special_tokens(Dialogue(tuple(messages)), self._reserved)
        text = self._in_own_tokens(Rendering(self.template.render_prompt(messages), ())).text
        return np.asarray(self.own.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)

    def num_tokens(self, dialogue: Dialogue) -> int:
        """Tokens of the whole dialogue, whatever `max_length`; raises UnrenderableDialogue."""
        text = self._in_own_tokens(self.template.render(dialogue)).text
        return len(self.own.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _in_own_tokens(self, rendering: Rendering) -> Rendering:
        """Replace the template's special strings (start of sequence, end of turn) by this model's own."""
        if self.template is self.own:
            return rendering
        theirs, ours = self.template, self.own
        pieces = rendering.text.split(theirs.end_of_turn)
        text = ours.end_of_turn.join(pieces)
        shift = len(ours.end_of_turn) - len(theirs.end_of_turn)
        their_start = theirs.tokenizer.bos_token or ""
        our_start = ours.tokenizer.bos_token or ""
        prefix = 0
        if their_start and their_start != theirs.end_of_turn and text.startswith(their_start):
            text = our_start + text[len(their_start) :]
            prefix = len(our_start) - len(their_start)

        def moved(position: int) -> int:
            return position + prefix + shift * rendering.text.count(theirs.end_of_turn, 0, position)

        turns = tuple(
            type(turn)(
                moved(turn.start), moved(turn.end), None if turn.end_of_turn is None else moved(turn.end_of_turn)
            )
            for turn in rendering.turns
        )
        return Rendering(text, turns)


def _supervise(
    ids_N: np.ndarray,
    starts_N: np.ndarray,
    text_ends_N: np.ndarray,
    rendering: Rendering,
    byte_of_char: np.ndarray,
    end_of_turn_id: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Mark supervised tokens; translate ends in the rendered text into ends in the assistant-content coordinate."""
    supervised = np.zeros(len(ids_N), dtype=bool)
    ends = np.zeros(len(ids_N), dtype=np.int64)
    for turn in rendering.turns:
        first, last = byte_of_char[turn.start], byte_of_char[turn.end]
        supervised |= (text_ends_N > first) & (starts_N < last)
        ends += (text_ends_N - first).clip(0, last - first)
        if turn.end_of_turn is not None:
            at = byte_of_char[turn.end_of_turn]
            token = int(np.searchsorted(starts_N, at, side="left"))
            while token < len(ids_N) and ids_N[token] != end_of_turn_id and starts_N[token] == at:
                token += 1  # zero-width tokens (a dummy prefix) may stand at the same byte
            if token < len(ids_N) and ids_N[token] == end_of_turn_id:
                supervised[token] = True
                ends[token:] += 1
    return supervised, ends


def _byte_offsets(text: str) -> np.ndarray:
    """Byte offset of every character of `text`, and of its end: int64 [len(text) + 1]."""
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    widths = 1 + (codes > 0x7F) + (codes > 0x7FF) + (codes > 0xFFFF)
    return np.concatenate(([0], np.cumsum(widths))).astype(np.int64)


def _reserved_strings(chat: ChatFormat) -> set[str]:
    """The end-of-turn, special tokens (not only those that have a name), and added tokens that the template writes."""
    template = str(chat.tokenizer.chat_template)
    added = chat.tokenizer.added_tokens_decoder.values()
    written = {one.content for one in added if one.special or (one.content in template and one.content.strip())}
    return {chat.end_of_turn, *chat.tokenizer.all_special_tokens, *written}


def _refuse_special_tokens(dialogue: Dialogue, reserved: Sequence[str]) -> None:
    """A message that spells a special token would be read as one, and could forge turns."""
    for token in reserved:
        if any(token in message.content for message in dialogue.messages):
            raise UnrenderableDialogue(f"a message contains the special token {token!r}")


def corpus_hash(encoded: Mapping[str, Encoded]) -> str:
    """SHA-256 over content hashes, ids and supervised positions, whatever the order of the mapping."""
    digest = hashlib.sha256()
    for name in sorted(encoded):
        digest.update(name.encode())
        digest.update(encoded[name].ids_N.tobytes())
        digest.update(encoded[name].rows_R.tobytes())
    return digest.hexdigest()
