"""The files that make weights a model: config, tokeniser, chat template, generation config."""

import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusion.cache import write_json
from fusion.merging.checkpoints.checkpoint import CONFIG_FILE, Checkpoint

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"
OLDER_VOCABULARIES = ("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "*.model", "*.tiktoken")
"""Other forms of what tokenizer.json holds."""
COMPANIONS = (
    CONFIG_FILE,
    GENERATION_CONFIG,
    "tokenizer*.json",
    "special_tokens_map.json",
    *OLDER_VOCABULARIES,
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)


@dataclass(frozen=True)
class Changes:
    """Companions of the merged model that differ from those of the model they come from."""

    written: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Name of a JSON file -> what it holds."""
    dropped: Collection[str] = ()
    """Patterns of names."""


def companions_of(checkpoint: Checkpoint) -> list[Path]:
    """Never code, pickles, or another model's card; not the index, which belongs to the weights."""
    return sorted({path for pattern in COMPANIONS for path in checkpoint.folder.glob(pattern) if path.is_file()})


def model_files(checkpoint: Checkpoint) -> list[Path]:
    """The files of an input that decide on the merged model."""
    index = [] if checkpoint.index is None else [checkpoint.index]
    return [*(file.path for file in checkpoint.files), *companions_of(checkpoint), *index]


def copy_companions(checkpoint: Checkpoint, changes: Changes, working: Path) -> None:
    dropped = {path for pattern in changes.dropped for path in checkpoint.folder.glob(pattern)}
    for path in companions_of(checkpoint):
        if path.name not in changes.written and path not in dropped:
            copied = working / path.relative_to(checkpoint.folder)
            copied.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copied)
    for name, content in changes.written.items():
        write_json(working / name, content)
