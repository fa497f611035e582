"""What a job leaves: a result that says how it ended, whatever ended it, in JSON that any program reads."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fusion.config import UserError
from fusion.config.launch import Job
from fusion.config.schema import ModelConfig
from fusion.tracking.record import RunRecord, is_finished, read_result, versions

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path / "job", "job", "python train.py seed=1", "seed: 1\n", None)


def record(job):
    return RunRecord(job, "train", 3, "abc")


def strictly(path):
    """JSON as other programs read it: NaN and infinities are no JSON."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(path.read_text("utf-8"), parse_constant=refuse)


def test_a_second_process_is_refused_and_takes_nothing_back(job):
    """One that was killed does not stand in the way."""
    program = (
        "import sys; from pathlib import Path; from fusion.config.launch import Job; "
        "from fusion.tracking.record import RunRecord; job = Job(Path(sys.argv[1]), 'job', '', '', None); "
        "held = RunRecord(job, 'train', 3, 'abc'); held.__enter__(); print('in', flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(job.folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "in\n"
        before = (job.folder / "result.json").read_bytes()
        with pytest.raises(UserError, match="another process is at this job"), record(job):
            pass
        assert (job.folder / "result.json").read_bytes() == before
        other.kill()
    with record(job) as one:
        one.finish({}, {})
    assert is_finished(job.folder, "abc")


def test_a_finished_job(job):
    with record(job) as one:
        assert read_result(job.folder)["status"] == "running"
        one.lap("train")
        one.lap("score")
        one.lap("train")
        one.finish({"steps": 5, "model": "model"}, {"pivot": ModelConfig(name="p", path="/p"), "data": Path("/d")})
    result, lineage = strictly(job.folder / "result.json"), strictly(job.folder / "lineage.json")
    assert (result["status"], result["stage"], result["seed"], result["steps"]) == ("finished", "train", 3, 5)
    assert list(result["timings_s"]) == ["score", "train"]
    assert all(seconds >= 0 for seconds in result["timings_s"].values())
    assert result["peak_memory_bytes"] > 1 << 20
    assert result["command"] == lineage["command"] == job.command
    assert lineage["pivot"]["path"] == "/p"
    assert lineage["data"] == "/d"
    assert lineage["versions"]["torch"] == versions()["torch"]
    assert lineage["config"] == (job.folder / "config.yaml").read_text() == job.config_yaml
    assert (job.folder / "command.txt").read_text() == job.command + "\n"
    assert is_finished(job.folder, "abc")
    assert not is_finished(job.folder, "other settings")


@pytest.mark.parametrize(
    "error", [ValueError("bad\nthing"), KeyboardInterrupt(), UserError(["one", "two"]), SystemExit(1)]
)
def test_a_job_that_fails_says_why(job, error):
    with pytest.raises(type(error)), record(job):
        raise error
    result = strictly(job.folder / "result.json")
    assert result["status"] == "failed"
    assert result["reason"].startswith(f"{type(error).__name__}: {str(error)[:3]}")
    assert not is_finished(job.folder, "abc")
    assert not (job.folder / "lineage.json").exists()


def test_what_fails_after_the_end_takes_no_result_back(job):
    def finish_and_fail():
        with record(job) as one:
            one.finish({"steps": 5}, {})
            raise OSError("the comparison page could not be written")

    with pytest.raises(OSError, match="comparison page"):
        finish_and_fail()
    assert read_result(job.folder)["steps"] == 5
    assert is_finished(job.folder, "abc")


def test_a_killed_job_is_still_running(job):
    code = (
        "import os, sys; from pathlib import Path; from fusion.config.launch import Job;"
        "from fusion.tracking.record import RunRecord;"
        f"RunRecord(Job(Path({str(job.folder)!r}), 'job', 'c', 'y', None), 'train', 0, 'abc').__enter__(); os._exit(9)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False)
    assert done.returncode == 9
    assert strictly(job.folder / "result.json")["status"] == "running"
    assert not is_finished(job.folder, "abc")


def test_a_job_that_starts_again_forgets_how_it_ended(job):
    with record(job) as one:
        one.finish({}, {})
    with record(job):
        assert not is_finished(job.folder, "abc")


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf"), np.float64("nan")])
def test_numbers_that_json_does_not_have_are_null(job, number):
    with record(job) as one:
        one.finish({"metrics": {"loss": number, "list": [number, 1.0]}}, {"score": number})
    result = strictly(job.folder / "result.json")
    assert result["metrics"] == {"loss": None, "list": [None, 1.0]}
    assert strictly(job.folder / "lineage.json")["score"] is None


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '"text"', b"\xff\xfe"])
def test_a_result_that_cannot_be_read_is_none(tmp_path, content):
    (tmp_path / "result.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert read_result(tmp_path) == {}
    assert read_result(tmp_path / "nowhere") == {}
    assert not is_finished(tmp_path, "abc")
