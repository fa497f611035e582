"""What `python -m fusion.teaching.inspect` prints and how it exits."""

import hashlib
import re
import subprocess
import sys

import numpy as np
import pytest
from tiny_models import make_tokenizer

from fusion.teaching import DistributionStore, TeacherRows
from fusion.teaching.inspect import main

NAMES = [hashlib.sha256(str(number).encode()).hexdigest()[:32] for number in range(3)]
ROWS = TeacherRows(
    np.asarray([[65, 66], [67, -1]], np.int32),
    np.log(np.asarray([[0.5, 0.25], [1.0, 1.0]])).astype(np.float32) + np.asarray([[0, 0], [0, -np.inf]], np.float32),
    np.asarray([0.25, 0.0], np.float32),
    np.asarray([0.75, 0.25], np.float32),
)


@pytest.fixture
def folder(tmp_path):
    store = DistributionStore(tmp_path / "store", "exact")
    for number, name in enumerate(NAMES):
        store.append(number, [name], [ROWS])
    store.finish({"model": "tiny", "top_k": 2})
    return tmp_path / "store"


def fact(text, name):
    return re.search(rf"{re.escape(name)}\s+(\S+)", text)[1]


def test_a_sound_store(folder, capsys):
    assert main([str(folder), "--rows", "3"]) == 0
    text = capsys.readouterr().out
    assert fact(text, "model") == "tiny"
    assert fact(text, "top_k") == "2"
    assert fact(text.split("model", 1)[1], "store ") == "exact"  # behind the title, which is the store's path
    assert fact(text, "dialogues") == "3"
    assert fact(text, "rows  ") == "6"
    assert fact(text, "candidates per row") == "1.50"
    assert fact(text, "tail mass") == "0.1250"
    entropy = -(0.5 * np.log(0.5) + 2 * 0.25 * np.log(0.25)) / 2
    assert float(fact(text, "as one token)")) == pytest.approx(entropy, abs=1e-4)
    assert fact(text, "per token)") == "0.5000"
    size = sum(file.stat().st_size for file in folder.iterdir())
    assert fact(text, "bytes per row") == f"{size / 6:.2f}"
    assert fact(text, "all ") == f"{size:,}"
    assert text.count("65 0.500  66 0.250") == 2  # three rows: two of the first dialogue, one of the second
    assert text.count("67 1.000") == 1
    assert "sound" in text


def test_tokens_are_shown_too(folder, tmp_path, capsys):
    tokenizer = make_tokenizer("byte_level", "chatml")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    assert main([str(folder), "--tokenizer", str(tmp_path / "tokenizer")]) == 0
    assert f"65 {tokenizer.decode([65])!r} 0.500" in capsys.readouterr().out


def test_every_damage_is_named(folder, capsys):
    (folder / "shard-000000.safetensors").unlink()
    victim = folder / "shard-000002.safetensors"
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    assert main([str(folder)]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert "shard-000000.safetensors: the shard is missing" in errors[0]
    assert "shard-000002.safetensors: the shard is damaged" in errors[1]


@pytest.mark.parametrize("damage", [b"{}", b"", None], ids=["other", "empty", "missing"])
def test_a_damaged_index_is_damage(folder, damage, capsys):
    index = folder / "index.json"
    index.unlink() if damage is None else index.write_bytes(damage)
    assert main([str(folder)]) == 1
    assert "index" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["nowhere"], "nowhere: no such folder"),
        (["."], "no distribution store in this folder"),
        (["store", "--tokenizer", "./nothing"], "--tokenizer (path=./nothing): no such folder"),
    ],
)
def test_mistakes_are_the_users(folder, arguments, complaint, capsys, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert main(arguments) == 2
    assert complaint in capsys.readouterr().err


def test_the_command_line(folder):
    done = subprocess.run(
        [sys.executable, "-m", "fusion.teaching.inspect", str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "sound" in done.stdout
