"""A training that was broken off goes on as if nothing had happened, or says why it does not."""

import csv
import json
import logging
import os
import random
import resource
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from checkpointed import STEPS, assert_equal, changed, go_on, kept, prepared, weights
from forked import ended, fork
from pytorch_lightning.strategies import SingleDeviceStrategy
from safetensors import safe_open
from tiny_models import make_qwen, make_tokenizer, save

from fusion.cache import file_hash
from fusion.config import UserError
from fusion.config.schema import LoraConfig, ObjectiveConfig, OptimConfig, ParallelConfig
from fusion.processes.failures import Terminated
from fusion.training.checkpoint_folder import discard_checkpoints
from fusion.training.checkpoints import Checkpoints, find_start
from fusion.training.fit import fit
from fusion.training.module import FusionModule
from fusion.training.random_state import load_random_state, save_random_state


@pytest.fixture(scope="module")
def data(tmp_path_factory, tiny_source):
    return prepared(tmp_path_factory.mktemp("checkpoints"), tiny_source, dropout=0.3)


@pytest.fixture(scope="module")
def whole(data):
    """A training that nobody disturbed and that kept no checkpoint."""
    return fit(data.config, data, [])


class Broken(Exception):
    """What ends a training in these tests."""


def break_off(data, folder, step):
    """Train until `step` optimiser steps are done and logged."""

    def fail(*_):
        raise Broken

    with pytest.MonkeyPatch.context() as patch:
        pause = Checkpoints.on_train_batch_start
        patch.setattr(
            Checkpoints,
            "on_train_batch_start",
            lambda one, trainer, *rest: (fail if trainer.global_step == step else pause)(one, trainer, *rest),
        )
        with pytest.raises(Broken):
            go_on(data, folder)


@pytest.fixture(scope="module")
def broken(data, tmp_path_factory):
    """Broken off after 13 steps; steps 5 and 10 are kept. Tests take copies of it."""
    folder = tmp_path_factory.mktemp("broken") / "job"
    break_off(data, folder, 13)
    return folder


@pytest.fixture
def job(broken, tmp_path):
    return shutil.copytree(broken, tmp_path / "job")


def logged(folder):
    with (folder / "csv" / "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["train/loss"]]


def spoil(path):
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def shard(job, step):
    (found,) = (job / "checkpoints" / step).glob("shard-*")
    return found


def test_a_run_goes_on_to_the_same_bytes(data, whole, job):
    assert kept(job) == ["step-000005", "step-000010"]
    assert [int(row["step"]) for row in logged(job)] == list(range(13))
    assert find_start(data, job).state.step == 10
    again = go_on(data, job)
    assert_equal(weights(again), weights(whole))
    assert again.steps == STEPS
    assert again.metrics["train/loss"] == whole.metrics["train/loss"]
    assert again.metrics["train/tokens"] == whole.metrics["train/tokens"]
    assert kept(job) == ["step-000020", "step-000024"]  # the last step has one too


def test_what_was_logged_goes_on_at_the_checkpoint(data, job):
    """Steps 10, 11 and 12 were logged before the run broke off, and are logged again: once each in the file."""
    before = logged(job)
    go_on(data, job)
    rows = logged(job)
    assert [int(row["step"]) for row in rows] == list(range(STEPS))
    assert [row["train/loss"] for row in rows[:13]] == [row["train/loss"] for row in before]
    assert not list(job.glob(".metrics*"))


def test_a_training_that_was_complete_is_not_repeated(data, whole, tmp_path):
    first = go_on(data, tmp_path)
    start = find_start(data, tmp_path)
    assert start.state.step == STEPS
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FusionModule, "training_step", lambda *_: pytest.fail("a step"))
        again = go_on(data, tmp_path)
    assert_equal(weights(again), weights(whole))
    assert again.metrics["train/loss"] == first.metrics["train/loss"]
    assert again.seconds >= start.state.seconds > 0
    discard_checkpoints(tmp_path)  # as a job does when its result is there
    assert find_start(data, tmp_path) is None


@pytest.mark.parametrize(
    ("every", "keep", "names"),
    [
        (12, 1, ["step-000024"]),
        (10, 5, ["step-000010", "step-000020", "step-000024"]),
        (STEPS, 1, ["step-000024"]),
        (STEPS + 1, 1, []),
        (0, 1, []),
    ],
)
def test_how_often_and_how_many(data, tmp_path, every, keep, names):
    module = changed(data, checkpoint_every_steps=every, keep_checkpoints=keep)
    fit(module.config, module, [], tmp_path)
    assert kept(tmp_path) == names


def test_every_file_is_in_the_manifest_and_none_is_a_pickle(job):
    for folder in (job / "checkpoints").iterdir():
        manifest = json.loads((folder / "manifest.json").read_text())["files"]
        files = {path.name: path for path in folder.iterdir()}
        assert {path.suffix for path in files.values()} == {".json", ".safetensors"}
        assert manifest.keys() == files.keys() - {"manifest.json"}
        for name, digest in manifest.items():
            assert digest == {"bytes": files[name].stat().st_size, "sha256": file_hash(files[name])}


def test_weights_that_are_shared_or_frozen_are_not_repeated(data, tmp_path):
    tokenizer = make_tokenizer("metaspace", "openchat")
    tied = replace(save(tmp_path / "tied", make_qwen(len(tokenizer)), tokenizer, "pivot"), name="pivot")
    for folder, changes in (("all", {}), ("lora", {"lora": LoraConfig(rank=2, dropout=0.5)})):
        module = changed(data, pivot=tied, **changes)
        wanted = weights(fit(module.config, module, []))
        break_off(module, tmp_path / folder, 11)
        with safe_open(shard(tmp_path / folder, "step-000010"), "pt") as file:
            names = [name for name in file.keys() if not name.startswith("optimizer/")]  # noqa: SIM118
            assert len(file.keys()) == 4 * len(names)  # with two moments and a count each
        assert all("lora_" in name for name in names) == (folder == "lora")
        assert not any("lm_head" in name for name in names)
        assert_equal(weights(go_on(module, tmp_path / folder)), wanted)


DAMAGES = {
    "the content of shard-00001-model-00001-of-00001.safetensors has changed": lambda job: spoil(
        shard(job, "step-000010")
    ),
    "shard-00001-model-00001-of-00001.safetensors has 1000 bytes instead of": lambda job: os.truncate(
        shard(job, "step-000010"), 1000
    ),
    "random-0.json is missing": lambda job: (job / "checkpoints" / "step-000010" / "random-0.json").unlink(),
    "stray.safetensors does not belong to it": lambda job: shutil.copy(
        shard(job, "step-000005"), job / "checkpoints" / "step-000010" / "stray.safetensors"
    ),
    "manifest.json cannot be read": lambda job: spoil_json(job / "checkpoints" / "step-000010" / "manifest.json"),
    "it has no manifest.json": lambda job: (job / "checkpoints" / "step-000010" / "manifest.json").unlink(),
}


def spoil_json(path):
    path.write_text(path.read_text()[:-20])


@pytest.mark.parametrize("problem", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(data, whole, job, caplog, problem):
    DAMAGES[problem](job)
    newest = job / "checkpoints" / "step-000010"
    with pytest.raises(UserError) as told:
        find_start(changed(data, resume=str(newest)), job)
    (said,) = told.value.problems
    assert str(newest) in said
    assert problem in said
    caplog.set_level(logging.WARNING, "fusion")
    assert find_start(data, job).state.step == 5
    assert said in caplog.text
    if problem == "random-0.json is missing":
        assert_equal(weights(go_on(data, job)), weights(whole))
        assert kept(job) == ["step-000020", "step-000024"]


def test_a_checkpoint_of_other_settings_is_not_resumed(data, job, caplog):
    module = changed(data, optim=OptimConfig(lr=1e-3), objective=ObjectiveConfig(name="sft"), batch_size=5)
    caplog.set_level(logging.WARNING, "fusion")
    assert find_start(module, job) is None
    assert "optim.lr is 0.01 there and 0.001 here" in caplog.text
    newest = job / "checkpoints" / "step-000010"
    with pytest.raises(UserError) as told:
        find_start(changed(module, resume=str(newest)), job)
    prefix = f"checkpoint {newest} has other settings: "
    said = [problem.removeprefix(prefix) for problem in told.value.problems]
    for difference in (
        "trainer.batch_size is 4 there and 5 here",
        "optim.grad_clip is 0.5 there and 1.0 here",
        'objective.name is "fusion" there and "sft" here',
        'alignment.name is "ms" there and null here',
    ):
        assert difference in said
    fit(module.config, module, [], job)  # from its beginning; its first checkpoint replaces the others
    assert kept(job) == ["step-000015", "step-000018"]
    assert find_start(data, job) is None


def test_how_and_where_a_run_is_computed_is_no_other_setting(data, job):
    other = {"micro_batch_size": 1, "packing": True, "checkpoint_every_steps": 3, "keep_checkpoints": 1}
    module = changed(data, **other, data_workers=1, threads=2, parallel=ParallelConfig(name="ddp", devices=2))
    assert find_start(module, job).state.step == 10


def test_a_run_goes_on_from_a_folder_or_never(data, whole, job, tmp_path):
    module = changed(data, resume=str(job / "checkpoints" / "step-000005"))
    assert find_start(module, tmp_path / "new").state.step == 5
    assert_equal(weights(go_on(module, tmp_path / "new")), weights(whole))
    never = changed(data, resume="never")
    assert find_start(never, job) is None
    break_off(never, job, 8)
    assert kept(job) == ["step-000005"]  # what was not resumed goes with the first checkpoint that is written
    with pytest.raises(UserError, match=r"is no whole checkpoint: it has no manifest.json; there are .*step-000005"):
        find_start(changed(data, resume=str(job)), job)


def test_every_generator_goes_on_where_it_stood(tmp_path):
    def draw():
        return [random.random(), random.gauss(0, 1), float(np.random.normal()), *torch.rand(3).tolist()]

    draw()
    save_random_state(tmp_path / "random.json")
    first, other = draw(), draw()
    load_random_state(tmp_path / "random.json")
    assert draw() == first
    assert draw() == other != first


def test_a_sigterm_is_heard_after_the_step_in_progress(data, whole, tmp_path, monkeypatch):
    at = 7

    def tell(module, _):
        if module.trainer.global_step == at - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(FusionModule, "on_before_optimizer_step", tell)
        with pytest.raises(
            Terminated, match=r"told to end \(SIGTERM\) after step 7 of 24; its checkpoint is in"
        ) as end:
            go_on(data, tmp_path)
    assert end.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before
    assert kept(tmp_path) == ["step-000005", "step-000007"]
    assert [int(row["step"]) for row in logged(tmp_path)] == list(range(at))
    again = go_on(data, tmp_path)
    assert_equal(weights(again), weights(whole))
    assert [int(row["step"]) for row in logged(tmp_path)] == list(range(STEPS))


def test_a_sigterm_in_the_last_step_keeps_the_end(data, whole, tmp_path, monkeypatch):
    module = changed(data, checkpoint_every_steps=0)
    with monkeypatch.context() as patch:
        patch.setattr(
            FusionModule,
            "on_before_optimizer_step",
            lambda one, _: os.kill(os.getpid(), signal.SIGTERM) if one.trainer.global_step == STEPS - 1 else None,
        )
        with pytest.raises(Terminated, match="after step 24 of 24"):
            go_on(module, tmp_path)
    assert kept(tmp_path) == ["step-000024"]
    assert_equal(weights(go_on(module, tmp_path)), weights(whole))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a process that has used a GPU cannot be forked")
def test_a_sigterm_behind_the_training_ends_the_job_at_once(data, tmp_path, monkeypatch):
    """While a large model is moved away there is no step whose end could be waited for."""
    monkeypatch.setattr(SingleDeviceStrategy, "teardown", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    assert ended(fork(lambda: fit(data.config, data, [], tmp_path))) == -signal.SIGTERM
    assert kept(tmp_path) == ["step-000020", "step-000024"]


def test_the_last_good_state_is_kept_when_a_loss_is_not_finite(data, whole, tmp_path, monkeypatch):
    """As if a device had erred in the ninth step."""
    module = changed(data, checkpoint_every_steps=0)
    outcome = FusionModule._outcome

    def err(one, sums, rows):
        return outcome(one, sums * float("nan") if one.trainer.global_step == 8 else sums, rows)

    with monkeypatch.context() as patch:
        patch.setattr(FusionModule, "_outcome", err)
        with pytest.raises(UserError, match="step 9: the loss is nan"):
            go_on(module, tmp_path)
    assert kept(tmp_path) == ["step-000008"]
    assert go_on(module, tmp_path).steps == STEPS


@pytest.mark.skipif(torch.cuda.is_available(), reason="a process that has used a GPU cannot be forked")
def test_a_full_disk_costs_the_checkpoint_and_not_the_run(data, whole, job, tmp_path):
    """Files of more than 100 kB cannot be written: shards are larger."""
    newest = {path.name: path.read_bytes() for path in (job / "checkpoints" / "step-000010").iterdir()}

    def work():
        log = logging.FileHandler(tmp_path / "log.txt")
        logging.getLogger("fusion").addHandler(log)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        assert_equal(weights(fit(data.config, data, [], job, find_start(data, job))), weights(whole))

    weights(whole)
    assert ended(fork(work)) == 0
    assert kept(job) == ["step-000005", "step-000010"]
    assert {path.name: path.read_bytes() for path in (job / "checkpoints" / "step-000010").iterdir()} == newest
    said = (tmp_path / "log.txt").read_text()
    for step in (15, 20, 24):
        assert f"step {step}: no checkpoint, an older one stays: [Errno 27] File too large" in said
