"""Reading the rows of a sweep: every model once, every failed job with its reason."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sample_rows import baselines, record_job, report, row, sweep

from fusion.config import UserError
from fusion.tracking.rows import ComparisonRow, read_rows, read_runs


@given(
    score=st.none() | st.floats(0, 1),
    nll=st.none() | st.floats(0, 100),
    seed=st.none() | st.integers(0, 2**31),
    name=st.text(max_size=8),
)
def test_rows_survive_json(score, nll, seed, name):
    one = row(
        name, "merged", score, seed=seed, nll_per_byte=nll, strong_skills=(name,), parameters={"a": {"b": [1, "x"]}}
    )
    assert ComparisonRow.from_json(json.loads(json.dumps(one.to_json())), "here") == one


def test_a_bad_row_names_every_problem():
    with pytest.raises(UserError) as caught:
        ComparisonRow.from_json(
            {"model": 3, "kind": "teacher", "scores": {"facts": 71.2}, "seed": 1}, "job/result.json"
        )
    problems = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 6
    for text in (
        "job/result.json",
        "'model'",
        "teacher",
        "71.2",
        "'path' is missing",
        "pivot, source, sft, target, merged",
    ):
        assert text in problems


def test_baselines_of_every_job_are_kept_once(tmp_path, caplog):
    record_job(tmp_path / "merge=ties", [row("ties", "merged", 0.61), *baselines()])
    record_job(tmp_path / "merge=sce", [row("sce", "merged", 0.7), *baselines()])
    record_job(tmp_path / ".merge=dare.building", [row("dare", "merged", 0.7)])
    rows = read_rows(tmp_path)
    assert [one.model for one in rows] == ["sce", "tiny_b", "tiny_a", "sft", "tiny_b", "tiny_a", "pivot", "ties"]
    assert not [one for one in caplog.records if one.name.startswith("fusion")]  # threads of others may say something


def test_scores_that_disagree_between_jobs_are_reported(tmp_path, caplog):
    record_job(tmp_path / "a", [row("pivot", "pivot", 0.4)])
    record_job(tmp_path / "b", [row("pivot", "pivot", 0.5)])
    (kept,) = read_rows(tmp_path)
    assert kept.scores["average"] == 0.4
    assert "kept the earlier scores" in caplog.text


def test_a_run_of_stage_1_gives_its_report_to_its_target_alone(tmp_path):
    record_job(tmp_path / "a", [row("tiny_a", "source", 0.4), row("tiny_a", "target", 0.5)], report=report())
    found = {one.kind: one.alignment for one in read_rows(tmp_path)}
    assert found == {"source": {}, "target": report()}


@pytest.mark.parametrize("written", [{"who_won": {"references": 5}}, {"alignment": {}}, "none", None])
def test_runs_that_aligned_nothing_give_no_report(tmp_path, written):
    record_job(tmp_path, [row("sft", "sft", 0.5), row("x", "target", 0.5)], report=written)
    assert [one.alignment for one in read_rows(tmp_path)] == [{}, {}]


def test_a_report_is_found_whichever_job_has_it(tmp_path):
    target = row("tiny_a", "target", 0.5)
    record_job(tmp_path / "merge of before", [target])
    record_job(tmp_path / "train", [target], report=report())
    record_job(tmp_path / "zmerge", [replace(target, alignment=report(trained_on=1))])
    (kept,) = read_rows(tmp_path)
    assert kept.alignment == report()
    assert replace(kept, alignment={}) == target


def test_a_report_must_be_an_object():
    with pytest.raises(UserError, match=r"'alignment' must be an object"):
        ComparisonRow.from_json({**row("a", "target", 0.5).to_json(), "alignment": [1]}, "here")


def test_jobs_without_scores_are_failures_with_reasons(tmp_path):
    record_job(tmp_path / "sweep/good", sweep())
    record_job(tmp_path / "sweep/stage1", status="finished")
    record_job(tmp_path / "sweep/oom", status="failed", reason="out of memory")
    record_job(tmp_path / "sweep/cut", status="running")
    record_job(tmp_path / "sweep/odd", comparison=[{"model": "x"}])
    record_job(tmp_path / "sweep/torn")
    (tmp_path / "sweep/torn/result.json").write_text('{"status": "fin')
    rows, failures = read_runs([tmp_path / "sweep", tmp_path / "sweep/good"])
    assert len(rows) == 8
    assert [(failure.job, failure.status) for failure in failures] == [
        ("sweep/cut", "running"),
        ("sweep/odd", "unreadable"),
        ("sweep/oom", "failed"),
        ("sweep/torn", "unreadable"),
    ]
    assert failures[2].reason == "out of memory"
    assert "'kind' is missing" in failures[1].reason


def test_folders_of_one_name_stay_apart(tmp_path):
    for parent in ("x", "y"):
        record_job(tmp_path / parent / "job", status="failed", reason=parent)
    _, failures = read_runs([tmp_path / "x/job", tmp_path / "y/job"])
    assert len({failure.job for failure in failures}) == 2
