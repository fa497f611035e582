"""A process that trains models of a world: `python -m fusion.world.worker FOLDER NAME...`."""

import os
import shutil
import sys
import threading
import zlib
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from random import Random

import torch
from transformers import PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from fusion.cache import fsync_tree
from fusion.config.world import PIVOT, WorldConfig
from fusion.dialogues.encode import Encoded, Encoder
from fusion.dialogues.template import chat_format
from fusion.world.corpora import model_corpus
from fusion.world.models import make_model
from fusion.world.tokenizers import make_tokenizer
from fusion.world.training import train
from fusion.world.world import read_config

REPORT_STEPS = 10


def build_model(name: str, config: WorldConfig, folder: Path, on_step: Callable[[int], None]) -> None:
    """Train `name` and write it as a Hugging Face folder that appears whole or not at all."""
    tokenizer = make_tokenizer(name, config)
    settings = config.models[name]
    examples = encode_corpus(name, config, tokenizer)
    model = make_model(settings, tokenizer, config.initializer_range, zlib.crc32(f"{config.seed}/{name}".encode()))
    train(model, examples, settings, config, f"{config.seed}/{name}/order", on_step)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    fsync_tree(partial)
    partial.rename(folder)


def encode_corpus(name: str, config: WorldConfig, tokenizer: PreTrainedTokenizerFast) -> list[Encoded]:
    """The training text of `name`; a source reads part of it in the pivot's template and the rest in its own."""
    own = chat_format(tokenizer, name)
    native = cache(Encoder(own).encode)
    if name == PIVOT:
        return [native(dialogue) for dialogue in model_corpus(name, config)]
    shared = cache(Encoder(own, chat_format(make_tokenizer(PIVOT, config), PIVOT)).encode)
    rng = Random(f"{config.seed}/templates/{name}")
    return [
        (shared if rng.random() < config.shared_template_share else native)(dialogue)
        for dialogue in model_corpus(name, config)
    ]


def main(folder: Path, names: Sequence[str]) -> None:
    threading.Thread(target=_die_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    disable_progress_bar()
    config = read_config(folder)
    (folder / "models").mkdir(exist_ok=True)
    for name in names:
        steps = config.models[name].steps

        def report(step: int, name: str = name, steps: int = steps) -> None:
            if step % REPORT_STEPS == 0 or step == steps:
                print(name, step, flush=True)

        build_model(name, config, folder / "models" / name, report)


def _die_with_parent() -> None:
    """The standard input ends when the parent is gone, even if it was killed."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
