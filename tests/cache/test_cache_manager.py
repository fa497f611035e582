"""What jobs refer to stays, whatever is asked; the rest goes only when it is really meant."""

import json
import shutil

import pytest
from filelock import FileLock

from fusion.cache import begin_uses, cached_folder, end_uses, record_uses, write_json
from fusion.cache.__main__ import main
from fusion.cache.manager import prunable, stages


def build(folder):
    write_json(folder / "content.json", {"a": 1})


@pytest.fixture
def cache(tmp_path):
    """A stage that a job used, one that a job's records name, one of a job that is gone, one of nobody, one killed."""
    root, runs = tmp_path / "cache", tmp_path / "runs"
    for name, stage in (("noted", "teaching"), ("gone", "alignment")):
        begin_uses()
        cached_folder(root, stage, {"for": name}, build)
        record_uses(runs / name)
        write_json(runs / name / "result.json", {"status": "finished"})
    shutil.rmtree(runs / "gone")
    begin_uses()
    named = cached_folder(root, "world", {"for": "named"}, build)
    write_json(runs / "named" / "result.json", {"status": "finished"})
    write_json(runs / "named" / "lineage.json", {"base": str(named / "models" / "pivot")})
    cached_folder(root, "scores", {"for": "nobody"}, build)
    (root / "fusion" / ".0123.building").mkdir(parents=True)
    return root


def by_kind(root):
    return {stage.kind: stage for stage in stages(root, [root.parent / "runs"])}


def command(root, *words):
    return main([*words, "--cache", str(root), "--runs", str(root.parent / "runs")])


def test_who_uses_what(cache):
    found = by_kind(cache)
    assert {kind: [user.name for user in stage.users] for kind, stage in found.items()} == {
        "teaching": ["noted"],
        "world": ["named"],
        "alignment": [],
        "scores": [],
        "fusion": [],
    }
    assert [kind for kind, stage in found.items() if not stage.is_finished] == ["fusion"]
    assert all(stage.num_bytes > 0 for kind, stage in found.items() if kind != "fusion")


def test_listing_and_a_dry_run_delete_nothing(cache, capsys):
    assert command(cache) == command(cache, "prune") == 0
    assert len(by_kind(cache)) == 5
    said = capsys.readouterr().out
    assert "runs/noted" in said
    assert "nothing is deleted without --yes" in said
    assert "kept because jobs refer to them: 2" in said


def test_what_a_job_refers_to_stays_until_it_is_asked_for(cache, capsys):
    assert command(cache, "prune", "--yes") == 0
    assert sorted(by_kind(cache)) == ["teaching", "world"]
    assert "deleted 3 folders" in capsys.readouterr().out
    command(cache, "prune", "--yes", "--used", "--stage", "world")
    assert sorted(by_kind(cache)) == ["teaching"]
    begin_uses()
    cached_folder(cache, "world", {"for": "named"}, build)  # is simply made again
    assert sorted(by_kind(cache)) == ["teaching", "world"]


def test_young_stages_and_other_kinds_stay(cache):
    command(cache, "prune", "--yes", "--older-than", "1")
    assert len(by_kind(cache)) == 5
    found = stages(cache)
    (chosen,) = prunable(found, older_than_days=0, kinds=["scores"], used_too=False)
    assert chosen.kind == "scores"


def test_what_is_being_built_stays(cache, capsys):
    with FileLock(cache / "fusion" / ".0123.lock"):
        command(cache, "prune", "--yes")
    assert "fusion" in by_kind(cache)
    assert "somebody builds it: fusion/0123" in capsys.readouterr().out


def test_a_missing_cache_and_damaged_notes(tmp_path, cache, capsys):
    assert main(["--cache", str(tmp_path / "nowhere")]) == 2
    assert "no such folder" in capsys.readouterr().err
    for note in (cache / ".users").glob("*.json"):
        note.write_text("{")
    assert by_kind(cache)["teaching"].users == ()


def test_a_job_that_runs_twice_keeps_all_that_it_used(tmp_path):
    root, job = tmp_path / "cache", tmp_path / "runs" / "job"
    for name in ("first", "second"):
        begin_uses()
        cached_folder(root, "teaching", {"for": name}, build)
        record_uses(job)
    (note,) = (root / ".users").glob("*.json")
    assert len(json.loads(note.read_text())["stages"]) == 2


def test_a_job_in_progress_keeps_what_it_has_used_so_far(tmp_path):
    """Between two of its laps, too."""
    root, job = tmp_path / "cache", tmp_path / "runs" / "slow"
    begin_uses(job)
    write_json(job / "result.json", {"status": "running"})
    cached_folder(root, "teaching", {"for": "slow"}, build)
    assert main(["prune", "--yes", "--cache", str(root)]) == 0
    assert by_kind(root)["teaching"].users == (job,)
    end_uses(job)
    cached_folder(root, "scores", {"for": "nobody"}, build)
    assert by_kind(root)["scores"].users == ()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--runs", "lost"], "lost: no such folder; name folders with jobs"),
        (["--stage", "teachin", "teaching"], "--stage teachin: there is none in this cache; it has alignment, fusion"),
        (["--older-than", "-1"], "--older-than -1: days from 0 on are expected"),
        (["--cache", "gone"], "gone: no such folder; name the cache"),
    ],
)
def test_a_mistyped_word_deletes_nothing(cache, capsys, words, said):
    assert main(["prune", "--yes", "--cache", str(cache), "--runs", str(cache.parent / "runs"), *words]) == 2
    assert capsys.readouterr().err.startswith(said)
    assert len(by_kind(cache)) == 5
