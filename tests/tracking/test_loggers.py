"""Loggers: mirrors of a job's record in its own folder, closed whatever happens."""

import contextlib
import csv
import os

import pytest

from fusion.config.launch import Job
from fusion.config.schema import LoggerConfig
from fusion.tracking.loggers import job_loggers, log_scores


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path, "job", "python train.py", "seed: 1\n", None)


def rows(folder):
    with (folder / "csv" / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_scores_reach_the_file(job):
    with job_loggers(LoggerConfig(name="csv"), job, "train", ["tag"]) as loggers:
        loggers[0].log_metrics({"train/loss": 0.5}, step=1)
        log_scores(loggers, {"add": 0.25, "units": None, "average": 0.5}, 0.75)
    merged = {key: value for row in rows(job.folder) for key, value in row.items() if value}
    assert float(merged["train/loss"]) == 0.5
    assert float(merged["score/add"]) == 0.25
    assert float(merged["heldout/nll_per_byte"]) == 0.75
    assert "score/units" not in merged


def test_a_job_that_fails_keeps_what_was_logged(job):
    def fail():
        with job_loggers(LoggerConfig(name="csv"), job, "train", []) as loggers:
            loggers[0].log_metrics({"train/loss": 0.5}, step=1)
            raise ValueError("the job's own")

    with pytest.raises(ValueError, match="the job's own"):
        fail()
    assert float(rows(job.folder)[0]["train/loss"]) == 0.5


@pytest.mark.parametrize(("fails", "exit_code"), [(False, 0), (True, 1)])
def test_wandb_hears_how_the_job_ended(job, monkeypatch, fails, exit_code):
    import wandb

    heard = []
    finish = wandb.Run.finish
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setattr(wandb.Run, "finish", lambda run, exit_code=None: (heard.append(exit_code), finish(run, 0))[1])
    with contextlib.suppress(ValueError), job_loggers(LoggerConfig(name="wandb"), job, "train", []):
        if fails:
            raise ValueError("the job's own")
    assert heard[-1] == exit_code


def test_a_second_attempt_starts_afresh(job):
    for loss in (1.0, 2.0):
        with job_loggers(LoggerConfig(name="csv"), job, "train", []) as loggers:
            loggers[0].log_metrics({"train/loss": loss}, step=0)
    assert [float(row["train/loss"]) for row in rows(job.folder)] == [2.0]


def test_no_logger_is_a_choice(job):
    with job_loggers(LoggerConfig(name="none"), job, "train", []) as loggers:
        assert loggers == []
        log_scores(loggers, {"add": 1.0}, None)
    assert list(job.folder.iterdir()) == []


@pytest.mark.parametrize("before", [None, "disabled"])
def test_the_mode_of_wandb_does_not_leak_to_the_next_job(job, monkeypatch, before):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if before:
        monkeypatch.setenv("WANDB_MODE", before)
    with job_loggers(LoggerConfig(name="none"), job, "train", []):
        os.environ["WANDB_MODE"] = "offline"  # as W&B does
    assert os.environ.get("WANDB_MODE") == before


def test_two_jobs_of_a_process_are_two_offline_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("one", "two"):
        job = Job(tmp_path / name, name, "python train.py", "seed: 1\n", tmp_path)
        (tmp_path / name).mkdir()
        with job_loggers(LoggerConfig(name="wandb", offline=True), job, "train", ["tag"]) as loggers:
            loggers[0].log_metrics({"train/loss": 0.5}, step=1)
        (run,) = (tmp_path / name / "wandb").glob("offline-run-*")
        assert len(list(run.glob("run-*.wandb"))) == 1
        assert f"wandb sync {run}" in capsys.readouterr().out
    assert "WANDB_MODE" not in os.environ
