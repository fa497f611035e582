"""Sweeps through the real commands: killed and run again, and what is shared between their jobs."""

import json
import subprocess
import sys
from pathlib import Path
from signal import SIGALRM

import pytest
import torch
from forked import doom, ended, fork
from tiny_models import make_llama, make_tokenizer, save

import merge
import train
from fusion.config.launch import launch
from fusion.dialogues.dialogue import chat, write_jsonl

REPOSITORY = Path(__file__).resolve().parents[2]
JOBS, ENOUGH = 12, 4


@pytest.fixture
def merging(tmp_path):
    """The words of a merge sweep of twelve jobs over random targets."""
    tokenizer = make_tokenizer("metaspace", "openchat")
    folders = [tmp_path / name for name in ("base", "a", "b", "c")]
    for seed, folder in enumerate(folders):
        save(folder, make_llama(len(tokenizer), seed), tokenizer, folder.name)
    targets = ",".join(map(str, folders[1:]))
    sweep = ["-m", "merge=linear,task_arithmetic,ties,sce", "merge.scale=0.5,1.0,1.5", "hydra.sweep.dir=sweep"]
    return [*sweep, f"base={folders[0]}", f"targets=[{targets}]", "evaluation=none", "logger=none"]


def finished(folder):
    """Names of finished jobs, with their results."""
    found = {}
    for file in folder.glob("*/result.json"):
        if json.loads(file.read_text())["status"] == "finished":
            found[file.parent.name] = file.read_bytes()
    return found


@pytest.mark.skipif(torch.cuda.is_available(), reason="a process that has used a GPU cannot be forked")
def test_a_killed_sweep_does_only_what_is_missing(merging, tmp_path, monkeypatch):
    whole = merge.merge_and_save

    def killed_after_enough(tasks):
        if len(finished(tmp_path / "sweep")) == ENOUGH:
            doom(20, 0)
        whole(tasks)

    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)
        patch.setattr("sys.argv", ["merge.py", *merging])
        patch.setattr(merge, "merge_and_save", killed_after_enough)
        assert ended(fork(lambda: launch("merge", merge.run))) == -SIGALRM
    before = finished(tmp_path / "sweep")
    assert len(before) == ENOUGH
    assert len(list((tmp_path / "sweep").glob("*/result.json"))) == ENOUGH + 1
    command = [sys.executable, str(REPOSITORY / "merge.py"), *merging]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    after = finished(tmp_path / "sweep")
    assert len(after) == JOBS
    assert {name: after[name] for name in before} == before
    assert done.stdout.count("finished before") == len(before)
    assert len(list((tmp_path / "sweep").glob("*/model/model.safetensors"))) == JOBS


def test_a_lambda_sweep_has_one_teacher_pass_and_one_alignment(tiny_pivot, tiny_source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "d.jsonl", [chat(f"Which river {n}?", "yes " * (1 + n % 4)) for n in range(16)])
    models = [f"{role}.path={model.path}" for role, model in (("pivot", tiny_pivot), ("source", tiny_source))]
    small = ["trainer.batch_size=8", "trainer.max_steps=1", "teacher.device=cpu", "parallel.accelerator=cpu"]
    words = ["pivot=hf", "source=hf", "data=jsonl", "data.path=d.jsonl", "evaluation=none", "logger=none"]

    def run(*more):
        monkeypatch.setattr("sys.argv", ["train.py", *more, *words, *models, *small, "trainer.progress_bar=false"])
        launch("train", train.run)
        return {
            stage.name: sorted(one.name for one in stage.glob("[!.]*")) for stage in (tmp_path / "cache").glob("[!.]*")
        }

    alone = run("objective.ce_weight=0.1", "hydra.run.dir=alone")
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*/[!.]*/key.json")}
    swept = run("-m", "objective.ce_weight=0.1,0.3,0.5,0.7,0.9", "hydra.sweep.dir=sweep")
    assert len(finished(tmp_path / "sweep")) == 5
    assert len(alone["teaching"]) == 2  # the pivot and the source, once each
    assert swept == alone
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*/[!.]*/key.json")} == stamps
