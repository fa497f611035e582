"""`--help` answers at once and leaves nothing out."""

import os
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
from cpu_time import run_and_weigh, weight_of_hydra
from omegaconf import OmegaConf

from fusion.config.compose import CONFIG_FOLDER, SCHEMAS
from fusion.config.help import field_sentences, help_text

REPOSITORY = Path(__file__).resolve().parents[2]
MOST_WORK = 7
"""In what Hydra alone costs; PyTorch costs ten of it."""


def nested(schema, prefix=""):
    """(dotted key, schema, field name) of every setting that is no table."""
    for field in fields(schema):
        value = getattr(schema(), field.name)
        if is_dataclass(value):
            yield from nested(type(value), f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", schema, field.name


@pytest.mark.parametrize("entry", SCHEMAS)
def test_every_setting_has_a_sentence(entry):
    text = " ".join(help_text(entry).split())
    for key, schema, name in nested(SCHEMAS[entry]):
        sentence = field_sentences(schema).get(name, "")
        assert sentence.endswith((".", ":")), f"{schema.__name__}.{name} needs a sentence"
        assert f"{key}: {sentence}" in text


@pytest.mark.parametrize("entry", SCHEMAS)
def test_every_group_with_every_option(entry):
    text = " ".join(help_text(entry).split())
    for default in OmegaConf.load(CONFIG_FOLDER / f"{entry}.yaml").defaults:
        if isinstance(default, str):
            continue
        ((group, chosen),) = default.items()
        options = sorted(path.stem for path in (CONFIG_FOLDER / group).glob("*.yaml"))
        listed = ", ".join(f"[{option}]" if option == chosen else option for option in options)
        assert f" {group}: {listed}".rstrip() in text


@pytest.mark.parametrize("entry", SCHEMAS)
def test_the_command_is_quick_and_complete(entry):
    command = [sys.executable, str(REPOSITORY / f"{entry}.py"), "--help"]
    asked = [run_and_weigh(command, env=os.environ | {"COLUMNS": "200"}) for _ in range(2)]  # the first may compile
    assert min(seconds for _, _, seconds in asked) < MOST_WORK * weight_of_hydra()
    said, complained, _ = asked[0]
    assert said.strip() == help_text(entry).strip()
    assert complained == ""
    for line in said.splitlines():
        assert len(line) <= 120
