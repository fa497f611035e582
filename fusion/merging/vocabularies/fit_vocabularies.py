"""Inputs whose tokens differ get the rows of one vocabulary, and the merged model its tokeniser and configs."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fusion.config import UserError, raise_problems
from fusion.config.schema import ModelConfig
from fusion.dialogues.token_bytes import TokenBytes, token_bytes
from fusion.merging.checkpoints.checkpoint import CONFIG_FILE, Checkpoint, is_adapter, read_json
from fusion.merging.checkpoints.companions import (
    GENERATION_CONFIG,
    OLDER_VOCABULARIES,
    TOKENIZER_CONFIG,
    TOKENIZER_FILE,
    Changes,
)
from fusion.merging.plan import input_labels
from fusion.merging.vocabularies.merged_tokenizer import Backend, restricted, united
from fusion.merging.vocabularies.same_tokens import other_tokens
from fusion.merging.vocabularies.token_rows import in_rows_of
from fusion.merging.vocabularies.vocabulary import ERROR, NONE, Vocabulary, match

log = logging.getLogger(__name__)

REBUILT = "PreTrainedTokenizerFast"
"""The class that reads tokenizer.json as it is."""


@dataclass(frozen=True)
class Fitted:
    """What came of it: `checkpoints` see the merged rows."""

    checkpoints: Mapping[str, Checkpoint]
    changes: Changes = field(default_factory=Changes)
    missing: Mapping[str, int] = field(default_factory=dict)
    """How many of the merged model's rows each input lacks."""
    num_new: int = 0
    """Tokens that the first input lacks."""


def fit_vocabularies(inputs: Mapping[str, Checkpoint], mode: str) -> Fitted:
    """Give all inputs, the first of which is the base if there is one, the rows of one vocabulary.

    Raises:
        UserError: other tokens, with `error`; otherwise a folder without tokeniser or `vocab_size`, or a tokeniser
            that cannot be rebuilt.
    """
    if mode == ERROR:
        raise_problems(other_tokens(inputs))
        return Fitted(inputs)
    known = _tokenizers(inputs, mode)
    tables, sizes, backends = zip(*known, strict=True)
    if mode != "base" and len(tables[0]) > sizes[0]:
        label = input_labels(inputs)[0]
        raise UserError(
            f"{label}: its tokeniser has {len(tables[0]):,} tokens, but the model {sizes[0]:,} rows, so that there is "
            f"no place for others behind them: resize its embedding, or take vocabulary=base"
        )
    vocabulary = match(mode, tables, sizes)
    rows = in_rows_of(list(inputs.values()), sizes, vocabulary, "base" in inputs)
    missing = {role: int((rows_V == NONE).sum()) for role, rows_V in zip(inputs, vocabulary.rows_IV, strict=True)}
    for role, count in missing.items():
        log.info("%s: lacks %d of the merged model's %d rows", role, count, vocabulary.size)
    is_first = np.array_equal(vocabulary.rows_IV[0], np.arange(sizes[0]))
    changes = Changes() if is_first else _changes(next(iter(inputs.values())), backends, vocabulary)
    return Fitted(dict(zip(inputs, rows, strict=True)), changes, missing, len(vocabulary.new))


Known = tuple[TokenBytes, int, Backend]
"""A tokeniser, as far as rows are concerned: its table, how many rows the model has for it, and its JSON."""


def _tokenizers(inputs: Mapping[str, Checkpoint], mode: str) -> list[Known]:
    """The tokeniser of every input; an adapter has that of its base."""
    from fusion.dialogues.tokenizer import load_tokenizer  # transformers is not needed for most merges

    known: list[Known] = []
    problems: list[str] = []
    for (role, checkpoint), label in zip(inputs.items(), input_labels(inputs), strict=True):
        if is_adapter(checkpoint.folder) and known:
            known.append(known[0])
            continue
        try:
            size = _vocabulary_size(checkpoint, mode)
            tokenizer = load_tokenizer(ModelConfig(name=checkpoint.folder.name, path=str(checkpoint.folder)))
            known.append((token_bytes(tokenizer), size, Backend.of(label, tokenizer)))
        except UserError as error:
            problems += [f"{role}: {problem}" for problem in error.problems]
    raise_problems(problems)
    return known


def _vocabulary_size(checkpoint: Checkpoint, mode: str) -> int:
    text = checkpoint.config.get("text_config")
    size = checkpoint.config.get("vocab_size") or (text.get("vocab_size") if isinstance(text, dict) else None)
    if not isinstance(size, int):
        raise UserError(f"{checkpoint.folder}: config.json has no vocab_size, which vocabulary={mode} needs")
    return size


def _changes(base: Checkpoint, backends: Sequence[Backend], vocabulary: Vocabulary) -> Changes:
    """Tokeniser and configs of a model whose tokens are not those of `base`."""
    backend = united(backends, vocabulary) if vocabulary.kept is None else restricted(backends[0], vocabulary)
    configs = {name: config for name in (CONFIG_FILE, GENERATION_CONFIG) if (config := read_json(base.folder / name))}
    settings = read_json(base.folder / TOKENIZER_CONFIG)
    if vocabulary.kept is not None:
        lost = [p for name, config in configs.items() for p in _lost_ids(config, vocabulary, f"{base.folder / name}")]
        raise_problems(lost + _lost_tokens(settings, backend, f"{base.folder / TOKENIZER_CONFIG}"))
    written: dict[str, Mapping[str, Any]] = {TOKENIZER_FILE: backend}
    written |= {name: _with_ids(config, vocabulary) for name, config in configs.items()}
    left_out = ("added_tokens_decoder", "auto_map")  # tokenizer.json has the tokens, and code does not come along
    kept = {key: value for key, value in settings.items() if key not in left_out}
    written[TOKENIZER_CONFIG] = {**kept, "tokenizer_class": REBUILT}
    return Changes(written, OLDER_VOCABULARIES)


def _ids_in(value: object) -> list[int]:
    """The ids in a config's value; some configs write -1 for none."""
    return [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, int) and one >= 0]


def _lost_ids(config: Mapping[str, Any], vocabulary: Vocabulary, where: str) -> list[str]:
    return [
        f"{where}: {key}={value} is a token that not all models have: take vocabulary=base or union"
        for key, value in config.items()
        if key.endswith("_token_id") and not set(_ids_in(value)) <= vocabulary.new_ids.keys()
    ]


def _with_ids(config: Mapping[str, Any], vocabulary: Vocabulary) -> dict[str, Any]:
    """Size and ids of special tokens in a config, also in the part about the language model."""
    new_ids, changed = vocabulary.new_ids, dict(config)
    for key, value in config.items():
        if key == "vocab_size":
            changed[key] = vocabulary.size
        elif key == "text_config" and isinstance(value, Mapping):
            changed[key] = _with_ids(value, vocabulary)
        elif key.endswith("_token_id") and _ids_in(value):
            changed[key] = [new_ids[one] for one in _ids_in(value)] if isinstance(value, list) else new_ids[value]
    return changed


def _lost_tokens(settings: Mapping[str, Any], backend: Mapping[str, Any], where: str) -> list[str]:
    known = {*backend["model"]["vocab"], *(entry["content"] for entry in backend["added_tokens"])}
    named = {key: value for key, value in settings.items() if key.endswith("_token") and value}
    contents = {key: value["content"] if isinstance(value, Mapping) else value for key, value in named.items()}
    return [
        f"{where}: {key} {content!r} is a token that not all models have: take vocabulary=base or union"
        for key, content in contents.items()
        if isinstance(content, str) and content not in known
    ]
