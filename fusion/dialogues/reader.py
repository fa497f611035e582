"""A model as a reader of dialogues: its tokeniser, its chat format, its encoder, and a name for its weights."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from fusion.cache import fingerprint, folder_hash
from fusion.config import UserError
from fusion.config.schema import ModelConfig
from fusion.dialogues.dialogue import Dialogue
from fusion.dialogues.encode import Encoded, Encoder
from fusion.dialogues.template import ChatFormat, UnrenderableDialogue, chat_format, require_template
from fusion.dialogues.token_bytes import token_bytes
from fusion.dialogues.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Reader:
    model: ModelConfig
    encoder: Encoder

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        return self.encoder.own.tokenizer

    @property
    def end_of_turn_id(self) -> int:
        return self.encoder.own.end_of_turn_id

    @property
    def vocab_size(self) -> int:
        """Ids of the tokeniser, unused ones in between included; a model's head may have more rows."""
        return len(token_bytes(self.tokenizer))

    @property
    def identity(self) -> str:
        """Names weights and tokeniser: a hash of the folder's content, or the hub id with its revision."""
        path = Path(self.model.path)
        return folder_hash(path) if path.is_dir() else f"{self.model.path}@{self.model.revision or 'main'}"

    @property
    def tokenizer_hash(self) -> str:
        tokenizer = self.tokenizer
        return fingerprint({"tokenizer": json.loads(tokenizer.backend_tokenizer.to_str()), "end": self.end_of_turn_id})


def make_readers(models: Sequence[ModelConfig], template: str, max_length: int | None = None) -> list[Reader]:
    """Readers of the pivot (first) and the sources; `template` is `shared` (the pivot's rendering) or `native`.

    Raises:
        UserError: every model whose tokeniser, chat template or end-of-turn is unusable, in one message.
    """
    problems: list[str] = []
    formats: list[ChatFormat] = []
    for place, model in enumerate(models):
        try:
            tokenizer = load_tokenizer(model)
            if place == 0 or template == "native":
                require_template(tokenizer, model.name)
            formats.append(chat_format(tokenizer, model.name, model.end_of_turn))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    rendering = formats[0] if template == "shared" else None
    return [Reader(model, Encoder(own, rendering, max_length)) for model, own in zip(models, formats, strict=True)]


def scoring_reader(model: ModelConfig, pivot: ModelConfig, max_length: int | None = None) -> Reader:
    """Reader of one model in its own chat template, or in the pivot's rendering when it has none."""
    if load_tokenizer(model).chat_template:
        return make_readers([model], "native", max_length)[0]
    return make_readers([pivot, model], "shared", max_length)[1]


def with_tokenizer(model: ModelConfig, folder: Path | None) -> ModelConfig:
    """What reads as `model` does, by the tokeniser in `folder`; None: the model itself."""
    return model if folder is None else replace(model, path=str(folder), revision=None)


def encode_all(
    readers: Sequence[Reader], dialogues: Sequence[Dialogue]
) -> tuple[list[Mapping[str, Encoded]], Counter[str]]:
    """Encode every dialogue for every reader: content hash -> tokens, one mapping per reader.

    A dialogue that one reader cannot carry is left out for all; the counter says how many went for which reason.
    """
    encoded: list[dict[str, Encoded]] = [{} for _ in readers]
    dropped: Counter[str] = Counter()
    for dialogue in {dialogue.content_hash: dialogue for dialogue in dialogues}.values():
        try:
            tokens = [reader.encoder.encode(dialogue) for reader in readers]
        except UnrenderableDialogue as error:
            dropped[str(error)] += 1
            continue
        for mapping, one in zip(encoded, tokens, strict=True):
            mapping[dialogue.content_hash] = one
    return list(encoded), dropped
