"""SIGKILL at any moment of a training: what was kept stays whole, and the end is the same to the byte."""

import csv
import json
import os
import random
import signal

import pytest
import torch
from checkpointed import STEPS, assert_equal, changed, go_on, kept, prepared, weights
from forked import ended, file_events, fork, killed
from safetensors.torch import load_file, save_file

from fusion.cache import file_hash

KILLS = 12


@pytest.fixture(scope="module")
def data(tmp_path_factory, tiny_source):
    module = prepared(tmp_path_factory.mktemp("killed"), tiny_source, dropout=0.3)
    return changed(module, checkpoint_every_steps=2)


def train(data, folder):
    """A job whose result is one file that appears at its end."""
    fitted = go_on(data, folder)
    save_file(weights(fitted), folder / ".result")
    (folder / ".result").rename(folder / "result.safetensors")


def logged_steps(folder):
    with (folder / "csv" / "metrics.csv").open() as file:
        return [int(row["step"]) for row in csv.DictReader(file)]


def check_kept(folder):
    """Every checkpoint that can be seen is whole; return the newest one's step."""
    for checkpoint in (folder / "checkpoints").glob("step-*"):
        for name, digest in json.loads((checkpoint / "manifest.json").read_text())["files"].items():
            assert file_hash(checkpoint / name) == digest["sha256"], (checkpoint, name)
    names = [name for name in kept(folder) if not name.startswith(".")]
    assert len(names) <= 3  # the third one while an older one goes
    return int(names[-1].removeprefix("step-")) if names else 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="a process that has used a GPU cannot be forked")
def test_a_training_that_is_killed_again_and_again(data, tmp_path):
    """Every attempt goes on where the last one was killed; when a job is finished, another one is begun."""
    events = file_events(lambda: train(data, tmp_path / "whole"))
    whole = load_file(tmp_path / "whole" / "result.safetensors")
    moments, number, kills, killed_at = random.Random(0), 0, 0, set()
    steps = [0]
    while kills < KILLS:
        folder = tmp_path / str(number)
        folder.mkdir(exist_ok=True)
        if not killed(lambda folder=folder: train(data, folder), moments, int(0.8 * events)):
            number += 1
            steps.append(0)
            continue
        kills += 1
        newest = check_kept(folder)
        assert newest >= steps[number]  # what was kept is never lost
        steps[number] = newest
        killed_at.add(newest)
    assert len(killed_at) > 3  # kills did come at different moments
    for folder in map(str, range(number + 1)):
        if not (tmp_path / folder / "result.safetensors").is_file():
            train(data, tmp_path / folder)
        assert_equal(load_file(tmp_path / folder / "result.safetensors"), whole)
        assert logged_steps(tmp_path / folder) == list(range(STEPS))
        *older, last_but_one, last = kept(tmp_path / folder)
        assert (last_but_one, last) == ("step-000022", "step-000024")
        assert older in ([], ["step-000020"][: steps[int(folder)] == STEPS])  # killed before it went, all steps done


@pytest.mark.skipif(torch.cuda.is_available(), reason="a process that has used a GPU cannot be forked")
@pytest.mark.parametrize("moment", ["file_hash", "write_json", "fsync_tree"])
def test_a_kill_while_a_checkpoint_is_written(data, tmp_path, monkeypatch, moment):
    """At the third checkpoint: while it is read through, before its manifest is there, and before it has its name."""
    from fusion.training import checkpoint_folder

    calls, whole = [], getattr(checkpoint_folder, moment)

    def dies(*arguments):
        if (tmp_path / "checkpoints" / ".step-000006.writing").is_dir():
            calls.append(arguments)
            if moment != "write_json" or len(calls) == 2:  # the first one is the state
                os.kill(os.getpid(), signal.SIGKILL)
        return whole(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_folder, moment, dies)
        assert ended(fork(lambda: train(data, tmp_path))) == -signal.SIGKILL
    assert kept(tmp_path) == [".step-000006.writing", "step-000002", "step-000004"]
    assert check_kept(tmp_path) == 4
    train(data, tmp_path)
    assert kept(tmp_path) == ["step-000022", "step-000024"]
