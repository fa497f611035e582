"""How a tokeniser spells: its token strings as bytes, read from the JSON of a Hugging Face fast tokeniser."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fusion.config import UserError

SPACE = 0x20
NO_BYTE = 0xFFFF
NOWHERE, FIRST_SEGMENT, EVERY_SEGMENT = "nowhere", "first segment", "every segment"


class Kind(NamedTuple):
    """What the components of a tokeniser say about its token strings."""

    marker: str | None
    """The sign for a space of a SentencePiece-like tokeniser; None for byte-level BPE."""
    byte_fallback: bool
    """Whether `<0xNN>` stands for one byte."""
    dummy_prefix: str
    """Where a space is put that is not in the text: nowhere, before the first segment or before every segment."""


class Spelling(NamedTuple):
    """All ids of a tokeniser."""

    literals: list[bytes]
    """The bytes of every id as it is written; empty for ids that name no token."""
    events: list[Mapping[str, Any]]
    """The entries of special tokens: id, content, lstrip, rstrip."""
    byte_pieces: frozenset[int]
    kind: Kind


def _name(tokenizer: Any) -> str:
    return str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)


def _backend_json(tokenizer: Any) -> dict[str, Any]:
    try:
        return json.loads(tokenizer.backend_tokenizer.to_str())
    except AttributeError as error:
        raise UserError(
            f"tokeniser {_name(tokenizer)}: only fast tokenisers have a byte table; save it once as tokenizer.json "
            "(AutoTokenizer.from_pretrained(..., use_fast=True).save_pretrained(folder)) and give that folder"
        ) from error


def read_spelling(tokenizer: Any) -> Spelling:
    """Raises UserError for tokenisers whose tokens are not pieces of the text's bytes (WordPiece and the like)."""
    backend = _backend_json(tokenizer)
    vocabulary = backend["model"].get("vocab", {})
    if not isinstance(vocabulary, dict):  # Unigram: [piece, score] in id order
        vocabulary = {piece: token for token, (piece, _) in enumerate(vocabulary)}
    added = {token["id"]: token for token in backend["added_tokens"]}
    pieces = [""] * (max([-1, *vocabulary.values(), *added]) + 1)
    for piece, token in vocabulary.items():
        pieces[token] = piece
    kind = _kind(backend, _name(tokenizer))
    literals = _space_marked(pieces, kind.marker) if kind.marker else _byte_level(pieces)
    byte_pieces = _byte_pieces(vocabulary) if kind.byte_fallback else {}
    for token, byte in byte_pieces.items():
        literals[token] = bytes([byte])
    spelled = set(vocabulary.values())
    for token, entry in added.items():
        # An added token of the model's own vocabulary (Gemma's runs of spaces) is spelled as the vocabulary spells.
        if entry["special"] or token not in spelled:
            literals[token] = entry["content"].encode("utf-8")
    events = [entry for entry in added.values() if entry["special"]]
    return Spelling(literals, events, frozenset(byte_pieces), kind)


def _kind(backend: Mapping[str, Any], name: str) -> Kind:
    readers = [*_components(backend["normalizer"]), *_components(backend["pre_tokenizer"])]
    parts = [*readers, *_components(backend["decoder"])]
    prefix = next(filter(None, map(_dummy_prefix, readers)), NOWHERE)
    kinds, model = {part["type"] for part in parts}, backend["model"]
    affixes = [model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix")]
    if model["type"] in ("BPE", "Unigram") and not any(affixes):
        if "ByteLevel" in kinds:
            return Kind(None, False, prefix)
        marker = next(filter(None, map(_space_marker, parts)), None)
        if marker:
            return Kind(marker, bool(model.get("byte_fallback")) or "ByteFallback" in kinds, prefix)
    raise UserError(
        f"tokeniser {name}: a {model['type']} model with {sorted(kinds) or 'no components'} is neither byte-level BPE "
        "nor SentencePiece-like, so its tokens are not bytes of the text; choose a model with one of these tokenisers"
    )


def _components(node: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if node is None:
        return []
    if node["type"] != "Sequence":
        return [node]
    inner = next(value for key, value in node.items() if key != "type")
    return [part for child in inner for part in _components(child)]


def _space_marker(part: Mapping[str, Any]) -> str | None:
    if part["type"] == "Metaspace":
        return part["replacement"]
    if part["type"] == "Replace" and part["pattern"] == {"String": " "}:
        return part["content"]
    return None


def _dummy_prefix(part: Mapping[str, Any]) -> str | None:
    if part["type"] == "Metaspace":  # files of before the scheme existed have a switch
        scheme = part.get("prepend_scheme", "always" if part.get("add_prefix_space", True) else "never")
        return {"always": EVERY_SEGMENT, "first": FIRST_SEGMENT}.get(scheme)
    prepends = part["type"] == "Prepend" or (part["type"] == "ByteLevel" and part.get("add_prefix_space"))
    return EVERY_SEGMENT if prepends else None


def _byte_pieces(vocabulary: Mapping[str, int]) -> dict[int, int]:
    """Id -> byte of the pieces that stand for one byte."""
    names = {f"<0x{byte:02X}>": byte for byte in range(0x100)}
    return {vocabulary[name]: byte for name, byte in names.items() if name in vocabulary}


def byte_letters() -> dict[int, str]:
    """The letter that byte-level BPE writes for each byte: itself where printable, else from U+0100 upwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(0x100) if byte not in set(printable)]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + i) for i, byte in enumerate(hidden)}


def _byte_level(pieces: Sequence[str]) -> list[bytes]:
    """All pieces at once through a table letter -> byte; a piece with any other letter is its own UTF-8."""
    table = np.full(0x110000, NO_BYTE, dtype=np.uint16)
    for byte, letter in byte_letters().items():
        table[ord(letter)] = byte
    codes = table[np.frombuffer("".join(pieces).encode("utf-32-le", "surrogatepass"), dtype=np.uint32)]
    bounds = np.cumsum([0, *map(len, pieces)])
    plain = codes.astype(np.uint8).tobytes()
    literals = [plain[start:stop] for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)]
    for token in set((np.searchsorted(bounds, np.flatnonzero(codes == NO_BYTE), side="right") - 1).tolist()):
        literals[token] = pieces[token].encode("utf-8")
    return literals


def _space_marked(pieces: Sequence[str], marker: str) -> list[bytes]:
    return [piece.replace(marker, " ").encode("utf-8") for piece in pieces]
