"""The text of `--help`: groups with their options, every setting with its sentence, and commands to copy."""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from typing import get_type_hints

from omegaconf import OmegaConf

from fusion.config.compose import CONFIG_FOLDER, SCHEMAS

WIDTH = 110
ABOUT = {
    "train": "stage 1: a target from a pivot and a source (by default the built-in world, offline on a CPU)",
    "merge": "stage 2: one model from the targets of stage 1, scored and compared",
    "evaluate": "scores of any models, and which differences between them are more than noise",
}
EXAMPLES = {
    "train": (
        "python train.py -m source=tiny_a,tiny_b,tiny_c",
        "python train.py objective=sft",
        "python train.py pivot=hf pivot.path=/models/a source=hf source.path=/models/b data=jsonl data.path=my.jsonl",
    ),
    "merge": (
        "python merge.py",
        "python merge.py -m merge=linear,task_arithmetic,ties,dare_linear,varm,sce merge.scale=search",
        "python merge.py merge=task_arithmetic targets=[/models/a,/models/b] base=/models/pivot",
    ),
    "evaluate": (
        "python evaluate.py models=[/models/pivot,/models/fused] data=jsonl data.path=my.jsonl scorers=[heldout]",
        "python evaluate.py models=[/models/pivot,/models/fused] scorers=[mt_bench,alpaca_eval] judge=openai",
        "python evaluate.py runs=[runs/merge]",
    ),
}


def help_text(entry: str) -> str:
    """Everything that an entry point (`train`, `merge`, `evaluate`) takes, from schemas and `conf/`."""
    sections = [
        f"{entry}.py, {ABOUT[entry]}",
        "Commands to copy:\n" + "\n".join(f"  {example}" for example in EXAMPLES[entry]),
        "Groups, chosen with group=option:\n" + "\n".join(_groups(entry)),
        "Settings, changed with key=value and swept with -m key=a,b,c:\n" + "\n".join(_settings(SCHEMAS[entry])),
        "Hydra's own options: --cfg job prints the composed settings, --multirun or -m sweeps, --config-dir DIR adds\n"
        "your own YAML files, --hydra-help tells more.",
        f'Words are completed after: eval "$(python {entry}.py -sc install=bash)" (or fish).',
    ]
    return "\n\n".join(sections)


def _groups(entry: str) -> Iterator[str]:
    for default in OmegaConf.load(CONFIG_FOLDER / f"{entry}.yaml").defaults:
        if isinstance(default, str):
            continue
        ((group, chosen),) = default.items()
        options = sorted(path.stem for path in (CONFIG_FOLDER / str(group)).glob("*.yaml"))
        text = f"{group}: " + ", ".join(f"[{option}]" if option == chosen else option for option in options)
        yield textwrap.fill(text, WIDTH, initial_indent="  ", subsequent_indent="      ")


def _settings(schema: type, prefix: str = "") -> Iterator[str]:
    sentences, types = field_sentences(schema), get_type_hints(schema)
    for field in fields(schema):
        nested = types[field.name]
        if is_dataclass(nested):
            assert isinstance(nested, type)
            yield from _settings(nested, f"{prefix}{field.name}.")
        else:
            text = f"{prefix}{field.name}: {sentences.get(field.name, '')}"
            yield textwrap.fill(text, WIDTH, initial_indent="  ", subsequent_indent="      ")


@cache
def field_sentences(schema: type) -> dict[str, str]:
    """The sentence under each field of a dataclass and of the dataclasses it extends."""
    sentences: dict[str, str] = {}
    for base in reversed(schema.__mro__):
        if is_dataclass(base):
            sentences |= _own_sentences(base)
    return sentences


def _own_sentences(schema: type) -> dict[str, str]:
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(schema))).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for field, sentence in zip(definition.body, definition.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(sentence, ast.Expr)
            and isinstance(sentence.value, ast.Constant)
        ):
            found[field.target.id] = " ".join(str(sentence.value.value).split())
    return found
