"""The tokeniser of a merged vocabulary: the base's, with tokens of others behind its own, or without some of its own.

Everything here is about the JSON of a fast tokeniser (https://huggingface.co/docs/tokenizers).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer

from fusion.config import UserError, raise_problems
from fusion.merging.vocabularies.vocabulary import Vocabulary

SHOWN = 3
Json = dict[str, Any]
READERS = ("normalizer", "pre_tokenizer", "decoder")


@dataclass(frozen=True)
class Backend:
    """A tokeniser's JSON; `label` is how problems call its model, `kind` its class in transformers."""

    label: str
    kind: str
    json: Json

    @classmethod
    def of(cls, label: str, tokenizer: Any) -> "Backend":
        content = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
        return cls(label, type(tokenizer).__name__, content)

    @cached_property
    def added(self) -> dict[int, Json]:
        return {entry["id"]: entry for entry in self.json["added_tokens"]}

    @cached_property
    def pieces(self) -> dict[int, str]:
        """Those of the model, as it spells them."""
        vocab = self.json["model"]["vocab"]
        if not isinstance(vocab, dict):  # Unigram: [piece, score] in the order of ids
            return {token: piece for token, (piece, _) in enumerate(vocab)}
        return {token: piece for piece, token in vocab.items()}

    def written(self, token: int) -> str:
        return self.added[token]["content"] if token in self.added else self.pieces[token]

    def copy(self) -> Json:
        """What may be changed; several times as fast as a deep copy."""
        return json.loads(json.dumps(self.json))

    def __str__(self) -> str:
        return f"{self.label}: its tokeniser ({self.kind}, {self.json['model']['type']})"


def united(backends: Sequence[Backend], vocabulary: Vocabulary) -> Json:
    """The first tokeniser, with `vocabulary.new`.

    Added tokens stay added ones. Other pieces, and the merges that lead to them, are put behind the base's own, so
    that the base's take precedence.

    Raises:
        UserError: the pieces cannot be united: other kinds of tokenisers, or no BPE.
    """
    merged = backends[0].copy()
    pieces: dict[int, dict[int, int]] = {}
    for row, source, own in vocabulary.new:
        if own in backends[source].added:
            merged["added_tokens"].append({**backends[source].added[own], "id": row})
        else:
            pieces.setdefault(source, {})[own] = row
    raise_problems([problem for i, own in pieces.items() for problem in _kind_problems(backends[0], backends[i], own)])
    if pieces:
        vocab = merged["model"]["vocab"]
        for entry in merged["added_tokens"]:  # ids between pieces must be taken when the pieces are counted
            vocab.setdefault(entry["content"], entry["id"])
        for source, rows in pieces.items():
            _add_pieces(merged["model"], backends[source], rows)
        merged["model"]["vocab"] = dict(sorted(vocab.items(), key=lambda item: item[1]))
    _check(merged, {row: backends[source].written(own) for row, source, own in vocabulary.new}, backends[0])
    return merged


def _kind_problems(base: Backend, other: Backend, rows: Mapping[int, int]) -> list[str]:
    is_bpe = base.json["model"]["type"] == other.json["model"]["type"] == "BPE"
    if is_bpe and all(base.json[part] == other.json[part] for part in READERS):
        return []
    shown = ", ".join(repr(other.pieces[token]) for token in list(rows)[:SHOWN])
    return [
        f"{other} has {len(rows):,} pieces, such as {shown}, that the tokeniser of {base.label} ({base.kind}, "
        f"{base.json['model']['type']}) lacks, and only BPE tokenisers that read text alike can be united: take "
        "vocabulary=base or intersect"
    ]


def _add_pieces(model: Json, source: Backend, rows: Mapping[int, int]) -> None:
    vocab = model["vocab"]
    vocab |= {source.pieces[own]: row for own, row in rows.items()}
    known = {tuple(pair) for pair in model["merges"]}
    model["merges"] += [
        [first, second]
        for first, second in source.json["model"]["merges"]
        if (first, second) not in known and {first, second, first + second} <= vocab.keys()
    ]


def restricted(backend: Backend, vocabulary: Vocabulary) -> Json:
    """The tokeniser with the tokens of `vocabulary.kept` alone, numbered anew.

    Raises:
        UserError: it is not BPE, or what it cannot do without is not among them.
    """
    new_ids = vocabulary.new_ids
    merged = backend.copy()
    model = merged["model"]
    raise_problems(_loss_problems(backend, new_ids))
    model["vocab"] = {piece: new_ids[token] for piece, token in model["vocab"].items() if token in new_ids}
    kept = model["vocab"].keys()
    model["merges"] = [pair for pair in model["merges"] if {*pair, "".join(pair)} <= kept]
    merged["added_tokens"] = [
        {**one, "id": new_ids[one["id"]]} for one in merged["added_tokens"] if one["id"] in new_ids
    ]
    _renumber(merged["post_processor"] or {}, new_ids)
    _check(merged, {new: backend.written(row) for row, new in new_ids.items()}, backend)
    return merged


def _loss_problems(backend: Backend, new_ids: Mapping[int, int]) -> list[str]:
    model, advice = backend.json["model"], "take vocabulary=base or union"
    if model["type"] != "BPE":
        return [f"{backend} cannot lose pieces, only BPE can: {advice}"]
    processor = backend.json["post_processor"] or {}
    if any("cls" in part for part in _parts(processor)):
        return [f"{backend} has a {processor['type']} processor and cannot lose tokens: {advice}"]
    byte_pieces = {f"<0x{byte:02X}>" for byte in range(256)} & model["vocab"].keys()
    added = {
        one for part in _parts(processor) for entry in part.get("special_tokens", {}).values() for one in entry["ids"]
    }
    unknown = [model["vocab"][model["unk_token"]]] if model.get("unk_token") in model["vocab"] else []
    needed = {*(model["vocab"][piece] for piece in byte_pieces), *added, *unknown}
    lost = sorted(backend.written(token) for token in needed - new_ids.keys())
    return [f"{backend} needs {', '.join(lost[:SHOWN])}, which not all models have: {advice}"] * bool(lost)


def _parts(processor: Json) -> list[Json]:
    return [processor, *processor.get("processors", [])]


def _renumber(processor: Json, new_ids: Mapping[int, int]) -> None:
    """The ids of special tokens that a post-processor adds."""
    for part in _parts(processor):
        for entry in part.get("special_tokens", {}).values():
            entry["ids"] = [new_ids[one] for one in entry["ids"]]


def _check(merged: Json, wanted: Mapping[int, str], base: Backend) -> None:
    """The tokeniser must load, and give every token the number of its row."""
    try:
        tokenizer = Tokenizer.from_str(json.dumps(merged))
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{base} cannot be rebuilt: {error}: take vocabulary=base") from error
    wrong = [content for token, content in wanted.items() if tokenizer.token_to_id(content) != token]
    if wrong:
        raise UserError(
            f"{base} would give {len(wrong):,} tokens of the merged model another number than their rows have, such "
            f"as {wrong[0]!r}: take vocabulary=base"
        )
