"""Loggers: mirrors of a job's record in its own folder, closed whatever happens."""

import contextlib
import csv
import os

import pytest
from pytorch_lightning.loggers import CSVLogger
from waiting import next_second

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
    with job_loggers(LoggerConfig(name="csv"), job, "train", ["tag"], "print") as loggers:
        loggers[0].log_metrics({"train/loss": 0.5}, step=1)
        log_scores(loggers, {"add": 0.25, "units": None, "average": 0.5}, 0.75)
    merged = {key: value for row in rows(job.folder) for key, value in row.items() if value}
    assert float(merged["train/loss"]) == 0.5
    assert float(merged["score/add"]) == 0.25
    assert float(merged["heldout/nll_per_byte"]) == 0.75
    assert "score/units" not in merged


def test_a_job_that_fails_keeps_what_was_logged(job):
    def fail():
        with job_loggers(LoggerConfig(name="csv"), job, "train", [], "print") as loggers:
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
    with contextlib.suppress(ValueError), job_loggers(LoggerConfig(name="wandb"), job, "train", [], "print"):
        if fails:
            raise ValueError("the job's own")
    assert heard[-1] == exit_code


def test_a_second_attempt_starts_afresh(job):
    for loss in (1.0, 2.0):
        with job_loggers(LoggerConfig(name="csv"), job, "train", [], "print") as loggers:
            loggers[0].log_metrics({"train/loss": loss}, step=0)
    assert [float(row["train/loss"]) for row in rows(job.folder)] == [2.0]


def attempt(job, steps, first_step=0, name="csv"):
    with job_loggers(LoggerConfig(name=name), job, "train", [], "print", first_step) as loggers:
        for step in steps:
            loggers[0].log_metrics({"train/loss": 10.0 + step, **({"train/mfu": 0.5} if step > 2 else {})}, step)
        log_scores(loggers, {"add": 0.25}, None)


def test_an_attempt_that_goes_on_keeps_the_steps_before(job):
    """Steps 3 and 4 are done again; the scores of the first attempt belong to a model that is gone."""
    attempt(job, range(5))
    attempt(job, range(3, 7), first_step=3)
    found = rows(job.folder)
    assert [int(row["step"]) for row in found if row["train/loss"]] == list(range(7))
    assert [float(row["train/loss"]) for row in found if row["train/loss"]] == [10.0 + step for step in range(7)]
    assert len([row for row in found if row["score/add"]]) == 1
    assert [path.name for path in job.folder.iterdir()] == ["csv"]


@pytest.mark.parametrize("torn", ["4,12", "4", "", "4,12.5,0."])
def test_a_row_that_a_kill_has_torn_is_left_out(job, torn):
    attempt(job, range(5))
    file = job.folder / "csv" / "metrics.csv"
    header, *whole = file.read_text().splitlines()
    file.write_text("\n".join([header, *whole[:4], torn]))
    attempt(job, [4], first_step=4)
    assert [int(row["step"]) for row in rows(job.folder) if row["train/loss"]] == list(range(5))


def test_a_kill_between_two_attempts_loses_no_row(job, monkeypatch):
    attempt(job, range(5))
    with monkeypatch.context() as patch:
        patch.setattr(CSVLogger, "save", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            attempt(job, [], first_step=5)
    attempt(job, [5], first_step=5)
    assert [int(row["step"]) for row in rows(job.folder) if row["train/loss"]] == list(range(6))


def test_tensorboard_shows_every_step_once(job):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    attempt(job, range(5), name="tensorboard")
    next_second()  # files are read in the order of the seconds in their names
    attempt(job, range(3, 7), first_step=3, name="tensorboard")
    curves = EventAccumulator(str(job.folder / "tensorboard"))
    curves.Reload()
    assert [one.step for one in curves.Scalars("train/loss")] == list(range(7))


def test_no_logger_is_a_choice(job):
    with job_loggers(LoggerConfig(name="none"), job, "train", [], "print") as loggers:
        assert loggers == []
        log_scores(loggers, {"add": 1.0}, None)
    assert list(job.folder.iterdir()) == []


@pytest.mark.parametrize("before", [None, "disabled"])
def test_the_mode_of_wandb_does_not_leak_to_the_next_job(job, monkeypatch, before):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if before:
        monkeypatch.setenv("WANDB_MODE", before)
    with job_loggers(LoggerConfig(name="none"), job, "train", [], "print"):
        os.environ["WANDB_MODE"] = "offline"  # as W&B does
    assert os.environ.get("WANDB_MODE") == before


def test_two_jobs_of_a_process_are_two_offline_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("one", "two"):
        job = Job(tmp_path / name, name, "python train.py", "seed: 1\n", tmp_path)
        (tmp_path / name).mkdir()
        with job_loggers(LoggerConfig(name="wandb", offline=True), job, "train", ["tag"], "print") as loggers:
            loggers[0].log_metrics({"train/loss": 0.5}, step=1)
        (run,) = (tmp_path / name / "wandb").glob("offline-run-*")
        assert len(list(run.glob("run-*.wandb"))) == 1
        assert f"wandb sync {run}" in capsys.readouterr().out
    assert "WANDB_MODE" not in os.environ


def test_attempts_of_a_job_are_one_run_of_wandb(tmp_path, monkeypatch, capsys):
    """Other settings in the same folder are another run."""
    monkeypatch.setenv("WANDB_SILENT", "true")
    job = Job(tmp_path, "job", "python train.py", "seed: 1\n", None)
    ids = []
    for fingerprint in ("one", "one", "two"):
        with job_loggers(LoggerConfig(name="wandb"), job, "train", [], fingerprint) as loggers:
            ids.append(loggers[0].experiment.id)
        next_second()  # attempts are told apart by the second in which they began
    assert ids[0] == ids[1] != ids[2]
    _, second, third = capsys.readouterr().out.splitlines()
    assert "wandb sync --append" in second
    assert second.count(f"-{ids[0]}") == 2
    assert "--append" not in third
