"""Every command that README.md shows runs, on the smoke world and with few steps."""

import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from chat_server import chat_server

from fusion.dialogues.dialogue import read_jsonl, write_jsonl

from .conftest import PATIENCE, REPOSITORY

SMALL = ("world=smoke", "trainer.max_steps=2")


def shown_commands():
    """Lines of README's shell blocks that call Python, without their comments."""
    blocks = re.findall(r"```sh\n(.*?)```", (REPOSITORY / "README.md").read_text(), flags=re.S)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    return [line for line in lines if line[:1] == ["python"]]


COMMANDS = shown_commands()


@pytest.fixture(scope="module")
def substitutes(workplace, merges):
    """What stands for the user's own models, dialogues and runs."""
    (world,) = (workplace.cache / "world").glob("[!.]*")
    mine = workplace.root / "my.jsonl"
    write_jsonl(mine, read_jsonl(world / "dialogues" / "train.jsonl")[:40])
    shutil.copytree(merges / "merge=sce", workplace.root / "runs" / "demo" / "merge=sce", dirs_exist_ok=True)
    shutil.copytree(merges / "merge=sce" / "model", workplace.root / "fused", dirs_exist_ok=True)
    return {
        "/models/pivot": str(world / "models" / "pivot"),
        "/models/fused": str(workplace.root / "fused"),
        "/models/a": str(world / "models" / "pivot"),
        "/models/b": str(world / "models" / "tiny_a"),
        "my.jsonl": str(mine),
        "runs/train/NAME_1": f"'{workplace.runs / 'targets' / 'source=tiny_a'}'",  # Hydra: = in a list wants quotes
        "runs/train/NAME_2": f"'{workplace.runs / 'targets' / 'source=tiny_b'}'",
    }


@pytest.fixture(scope="module")
def judge(workplace):
    """What stands for the judge of the hub's benchmarks: a server, and a few questions."""
    questions = [{"question_id": 81, "category": "writing", "turns": ["Name a river.", "And another."]}]
    questions += [{**questions[0], "question_id": 82}]
    baseline = [{"instruction": f"Name river {number}.", "output": "Rhine", "dataset": "x"} for number in range(3)]
    (workplace.root / "question.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    (workplace.root / "baseline.json").write_text(json.dumps(baseline))
    with chat_server(lambda payload: "M" if payload["max_tokens"] == 1 else "Fair. [[6]]") as server:
        yield {
            "judge=openai": ["judge=local", f"judge.base_url={server.base_url}", "generation.max_new_tokens=4"],
            "scorers=[mt_bench,alpaca_eval]": [
                "scorers=[mt_bench,alpaca_eval]",
                "mt_bench.questions=question.jsonl",
                "alpaca_eval.questions=baseline.json",
                "alpaca_eval.gamed=''",
            ],
        }


def test_readme_shows_all_entry_points():
    assert {command[1] for command in COMMANDS} >= {"train.py", "merge.py", "evaluate.py", "-m"}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_command_runs(command, workplace, substitutes, judge):
    words = [new for word in command[1:] for new in judge.get(word, [word])]
    for placeholder, real in substitutes.items():
        words = [word.replace(placeholder, real) for word in words]
    if any(word.startswith("experiments=fuse") for word in words):
        words.append("plan=true")  # models of the hub
    if any(word.startswith("hparams_search=") for word in words):
        pytest.importorskip("hydra_plugins.hydra_optuna_sweeper.optuna_sweeper")
        words.append("hydra.sweeper.n_trials=2")
    if words[0] == "train.py":
        small = SMALL if "data=jsonl" not in words else (*SMALL[1:], "trainer.batch_size=8")
        words += [word for word in small if word.partition("=")[0] not in " ".join(words)]
        words += ["paths.runs=readme_runs"]  # so that the targets that merge.py finds stay those of the fixture
    if words[0].endswith(".py"):
        words[0] = str(REPOSITORY / words[0])
    command = [sys.executable, *words]
    done = subprocess.run(command, cwd=workplace.root, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
