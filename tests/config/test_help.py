"""`--help` answers at once and leaves nothing out."""

import os
import resource
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from fusion.config.compose import CONFIG_FOLDER, SCHEMAS
from fusion.config.help import field_sentences, help_text

REPOSITORY = Path(__file__).resolve().parents[2]
MOST_SECONDS = 1.5


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
    def ask():
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        command = [sys.executable, str(REPOSITORY / f"{entry}.py"), "--help"]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"}, check=True)
        return done, resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before

    done, seconds = ask()
    if seconds > MOST_SECONDS:  # a busy machine costs caches, so once more
        done, seconds = ask()
    assert seconds < MOST_SECONDS
    assert done.stdout.strip() == help_text(entry).strip()
    assert done.stderr == ""
    for line in done.stdout.splitlines():
        assert len(line) <= 120
