"""Typical mistakes and the message that each gets; run as a command it writes `docs/mistakes.md` anew."""

import contextlib
import io
import os
import re
import shlex
import sys
import tempfile
from pathlib import Path
from unittest import mock

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from fusion.config.launch import launch  # noqa: E402

PAGE = REPOSITORY / "docs" / "mistakes.md"
FILES = {
    "mine/optim/slow.yaml": "lr: slow\nshedule: cosine\n",
    "mine/trainer/long.yaml": "epochs: 0\nbatch_size: 128\n",
    "mine/merge/broken.yaml": "method: sce\ntau 0.5\n",
    "mine/experiments/mine.yaml": "# @package _global_\ndefaults:\n  - override /optim: papr\n",
}
MISTAKES = {
    "Typing errors": (
        "train.py sede=1",
        "train.py optm.lr=1e-4",
        "train.py lr=1e-4",
        "train.py batch_size=16",
        "train.py objctive=sft",
        "train.py optim=papr",
        "train.py -m source=tiny_a,tiny_x",
        "merge.py merge=sec",
        "merge.py merge=linear merge.tau=0.1",
        "train.py merge=linear",
        "train.py +trainer.epoch=2",
        "train.py --multi-run seed=1,2",
    ),
    "Wrong types and values": (
        "train.py optim.lr=fast",
        "train.py trainer.epochs=1.5",
        "train.py data.limit=all",
        "train.py objective.ce_weight=90",
        "train.py alignment.fallback=guess",
        "train.py teacher.top_k=0",
        "train.py optim.betas=[0.9]",
        "merge.py engine.memory=lots",
        "merge.py targets=5",
        "train.py tags=demo",
        "train.py source.name=org/model",
        "merge.py targets=[]",
    ),
    "Words that the shell or Hydra reads otherwise": (
        "train.py seed",
        "train.py source=tiny_a,tiny_b",
        "train.py seed=1 -m trainer.epochs=1,2 optim.lr=1e-3",
    ),
    "Missing files": (
        "train.py pivot=hf source=hf source.path=/models/b",
        "train.py data=jsonl data.path=no_such.jsonl",
        "train.py pivot=hf pivot.path=/models/lost source=hf source.path=/models/gone",
        "merge.py targets=[runs/lost] base=/models/gone",
        "merge.py",
    ),
    "Combinations that make no sense": (
        "train.py parallel.devices=2",
        "train.py teacher.placement=fsdp",
        "train.py pivot=qwen3_0_6b source=qwen3_0_6b",
    ),
    "In files of your own": (
        "train.py --config-dir mine optim=slow",
        "train.py --config-dir mine trainer=long",
        "train.py --config-dir mine experiments=mine",
        "merge.py --config-dir mine merge=broken",
    ),
    "Several at once": (
        "train.py sede=1 optim=papr optim.lr=fast template=odd data.limit=0",
        "merge.py sede=1 merge.tau=often base=/models/gone engine.memory=1MiB",
    ),
}


def complaint(command: str) -> str:
    """What the command says on its standard error in an empty folder; asserts that it ends with 2."""
    import merge
    import train

    entry, *words = shlex.split(command)
    said = io.StringIO()
    given = {"train": (train.run,), "merge": (merge.run, None, merge.method_problems)}[entry.removesuffix(".py")]
    with mock.patch.object(sys, "argv", [entry, *words]), contextlib.redirect_stderr(said):
        code = 0
        try:
            launch(entry.removesuffix(".py"), *given)
        except SystemExit as stop:
            code = stop.code
    assert code == 2, f"{command}: no mistake was found"
    return said.getvalue().replace(str(REPOSITORY), "")


def page() -> str:
    """The page, with every command run in a folder that holds only `FILES`."""
    parts = [HEAD]
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as place:
        for name, text in FILES.items():
            path = Path(place).resolve() / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        os.chdir(place)
        try:
            for title, commands in MISTAKES.items():
                parts += [f"## {title}", "| command | message |\n|---|---|\n" + "\n".join(map(_row, commands))]
        finally:
            os.chdir(here)
    return "\n\n".join(parts) + "\n"


HEAD = """# Mistakes, and what is said about them

All problems of a command come in one message, before anything runs, and the command ends with 2. Each names the
nearest valid word where there is one, and the file and line that set it where that was not the command itself. Every
line below is what the program says; `python tests/config/mistakes.py` writes this page anew."""


def _row(command: str) -> str:
    said = complaint(command).splitlines()
    problems = [line.removeprefix("  - ") for line in said if line.startswith("  - ")]
    assert problems, (command, said)
    return f"| `{_cell(command)}` | {'<br>'.join(map(_cell, problems))} |"


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
