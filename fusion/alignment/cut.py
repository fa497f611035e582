"""Bytes cut into the tokens that a tokeniser writes them with in the middle of a text."""

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from tokenizers import Tokenizer

from fusion.dialogues.token_bytes import TokenBytes
from fusion.dialogues.token_spelling import SPACE, byte_letters

REMEMBERED = 1 << 17
FIRST_STRAY, LAST_STRAY = 0xDC80, 0xDCFF  # how "surrogateescape" decodes the bytes 0x80 to 0xFF


class Cutter:
    """The tokeniser's own pipeline without a dummy prefix; its special tokens are text like any other.

    Bytes that are not text are cut as well: byte-level BPE merges them, SentencePiece writes one piece for each.
    """

    def __init__(self, tokenizer: Any, table: TokenBytes) -> None:
        self._backend = _as_continuation(tokenizer.backend_tokenizer)
        letters = byte_letters()
        self._letters = letters if table.space_marker == letters[SPACE] else None
        self._byte_ids = {table[token]: token for token in table.byte_pieces}
        self.cut = lru_cache(maxsize=REMEMBERED)(self._cut)

    def _cut(self, content: bytes) -> list[int]:
        """Ids of the tokens; a byte that no token stands for ends the list."""
        try:
            return self._text(content.decode("utf-8"))
        except UnicodeDecodeError:
            return self._pieces(content) if self._letters is None else self._merged(content, self._letters)

    def _text(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def _merged(self, content: bytes, letters: Mapping[int, str]) -> list[int]:
        """No rule of the pre-tokeniser speaks about half a character, so the merges alone decide."""
        return [token.id for token in self._backend.model.tokenize("".join(map(letters.__getitem__, content)))]

    def _pieces(self, content: bytes) -> list[int]:
        ids, text = [], ""
        for character in content.decode("utf-8", "surrogateescape"):
            if not FIRST_STRAY <= ord(character) <= LAST_STRAY:
                text += character
                continue
            ids += self._text(text)
            text, piece = "", self._byte_ids.get(character.encode("utf-8", "surrogateescape"))
            if piece is None:
                return ids
            ids.append(piece)
        return ids + self._text(text)


def _as_continuation(backend: Tokenizer) -> Tokenizer:
    """A copy that adds and leaves out nothing: no dummy prefix, template, padding, truncation or BPE dropout."""
    spec = json.loads(backend.to_str())
    spec |= {"post_processor": None, "padding": None, "truncation": None}
    for part in ("normalizer", "pre_tokenizer"):
        spec[part] = _without_prefix(spec[part])
    if "dropout" in spec["model"]:
        spec["model"]["dropout"] = None
    copy = Tokenizer.from_str(json.dumps(spec))
    copy.encode_special_tokens = True
    return copy


def _without_prefix(node: dict[str, Any] | None) -> dict[str, Any] | None:
    """A normaliser or pre-tokeniser that adds no space in front; None when nothing else is left of it."""
    if node is None or node["type"] == "Prepend":
        return None
    if node["type"] == "Metaspace":
        return {"type": "Metaspace", "prepend_scheme": "never"} | {
            key: node[key] for key in ("replacement", "split") if key in node
        }
    if node["type"] == "ByteLevel":
        return node | {"add_prefix_space": False}
    if node["type"] == "Sequence":
        key = next(key for key in node if key != "type")
        return node | {key: [part for part in map(_without_prefix, node[key]) if part is not None]}
    return node
