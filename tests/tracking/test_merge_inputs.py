"""Which stage-1 runs belong together, and what a merge is made of."""

import json
from dataclasses import replace

import pytest

from fusion.config import UserError
from fusion.config.schema import MergeConfig, PathsConfig
from fusion.dialogues.dialogue import chat, write_jsonl
from fusion.tracking.inputs import find_inputs
from fusion.tracking.stage1 import finished_runs, latest_targets, matching_sft, named_runs


class Runs:
    """Stage-1 runs below one folder, each later than the one before."""

    def __init__(self, root):
        self.root, self.time = root, 0
        self.pivot = root / "models" / "pivot"
        self.pivot.mkdir(parents=True)
        (self.pivot / "config.json").write_text("{}")

    @property
    def runs(self):
        return self.root / "runs"

    def add(self, folder, name="a", objective="fusion", seed=0, group="g", setting="s", pivot=None, won=(), **changes):
        self.time += 1
        path = self.runs / folder
        (path / "model").mkdir(parents=True)
        (path / "model" / "weights").write_text(folder)
        result = {
            "stage": "train",
            "status": "finished",
            "name": name,
            "objective": objective,
            "seed": seed,
            "group": group,
            "setting": setting,
            "fingerprint": folder,
            "time": self.time,
            **changes,
        }
        (path / "result.json").write_text(json.dumps({key: one for key, one in result.items() if one is not None}))
        model = {"name": "pivot", "path": str(pivot or self.pivot)}
        lineage = {"pivot": model, "sources": [{"name": name, "path": "/s"}], "data": {"path": "d.jsonl"}}
        (path / "lineage.json").write_text(json.dumps({**lineage, "strong_skills": {}}))
        write_jsonl(path / "heldout_won.jsonl", won)
        return path

    def latest(self, seed=0):
        return [run.folder.name for run in latest_targets(finished_runs(self.runs), seed, self.runs)]

    def inputs(self, **settings):
        return find_inputs(MergeConfig(paths=PathsConfig(runs=str(self.runs)), **settings))


@pytest.fixture
def runs(tmp_path):
    return Runs(tmp_path)


def test_the_latest_targets_differ_in_their_source_alone(runs):
    runs.add("sweep/old_a", "a", group="old")
    runs.add("sweep/c", "c")
    runs.add("sweep/a", "a")
    runs.add("b", "b")
    runs.add("elsewhere", "b", group="other settings")
    runs.add("sft", "a", objective="sft")
    runs.add("b_again", "b")
    assert runs.latest() == ["a", "b_again", "c"]


def test_the_seed_decides_which_runs_are_preferred(runs):
    for seed in (1, 2):
        for name in "ab":
            runs.add(f"{name}{seed}", name, seed=seed, group=f"seed {seed}")
    assert runs.latest(seed=1) == ["a1", "b1"]
    assert runs.latest(seed=2) == runs.latest(seed=3) == ["a2", "b2"]


def test_runs_that_are_no_finished_targets_do_not_count(runs):
    runs.add("good", "a")
    runs.add("running", "b", status="running")
    runs.add("failed", "c", status="failed")
    runs.add("merge", "d", stage="merge")
    (runs.add("no model", "e") / "model" / "weights").unlink()
    (runs.runs / "no model" / "model").rmdir()
    (runs.runs / "odd").mkdir()
    (runs.runs / "odd" / "result.json").write_text("[1, 2]")
    assert runs.latest() == ["good"]


def test_everything_that_is_not_there_is_told_at_once(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # names with a slash may be the hub's
    with pytest.raises(UserError) as caught:
        runs.inputs(targets=["models/lost", str(runs.add("good", "a")), "gone"], base="/no/base")
    first, second, third = caught.value.problems
    assert first.startswith("targets[0]=models/lost: no such folder")
    assert "targets[2]=" in second
    assert "base=/no/base" in third


def test_without_targets_the_way_to_them_is_told(runs):
    runs.add("sft", objective="sft")
    with pytest.raises(UserError, match=r"targets=latest: no finished target below .*train\.py"):
        runs.latest()


def test_the_sft_baseline_has_the_same_setting(runs):
    target = runs.add("target", "a", setting="s1")
    runs.add("old_sft", objective="sft", setting="s1")
    runs.add("sft", objective="sft", setting="s1")
    runs.add("other_sft", objective="sft", setting="s2")
    known = finished_runs(runs.runs)
    (run,) = [one for one in known if one.folder == target]
    assert matching_sft(known, run).folder.name == "sft"
    assert runs.inputs().sft.folder.name == "sft"
    assert runs.inputs(sft=str(runs.runs / "old_sft")).sft.folder.name == "old_sft"


def test_named_targets_keep_their_order(runs):
    second, first = runs.add("second", "b"), runs.add("first", "a")
    bare = runs.pivot
    found = named_runs([str(first), str(bare), str(second)])
    assert [getattr(one, "folder", one).name for one in found] == ["first", "pivot", "second"]


def test_a_folder_above_runs_stands_for_its_targets(runs):
    for name in "ba":
        runs.add(f"sweep/{name}", name)
    runs.add("sweep/sft", objective="sft")
    assert [run.name for run in named_runs([str(runs.runs / "sweep")])] == ["a", "b"]


def test_every_folder_that_is_no_target_is_named(runs, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    running, failed = runs.add("running", status="running", name=None), runs.add("failed", status="failed")
    with pytest.raises(UserError) as caught:
        named_runs([str(runs.add("good")), str(empty), str(running), str(failed), str(tmp_path / "missing")])
    problems = caught.value.problems
    assert [problem.partition("=")[0] for problem in problems] == [f"targets[{place}]" for place in (1, 2, 3, 4)]
    assert "neither a run of train.py" in problems[0]
    assert "running, not finished" in problems[1]
    assert "failed, not finished" in problems[2]


def test_inputs_know_their_pivot_and_what_sources_won(runs):
    one, two, three = (chat("q", answer) for answer in "123")
    runs.add("a", "a", won=[one, two])
    runs.add("b", "b", won=[two, three])
    inputs = runs.inputs()
    assert [target.name for target in inputs.targets] == ["a", "b"]
    assert inputs.base == runs.pivot
    assert inputs.pivot.path == str(runs.pivot)
    assert inputs.data.path == "d.jsonl"
    assert [dialogue.content_hash for dialogue in inputs.heldout_won] == sorted(
        dialogue.content_hash for dialogue in (one, two, three)
    )
    lineage = inputs.lineage()
    assert set(lineage["stage1"]) == {"a", "b"}
    assert lineage["inputs"] == inputs.identity
    assert inputs.sft is None


def test_the_identity_changes_with_every_input(runs):
    first, second = runs.add("a", "a"), runs.add("b", "b")
    names = [str(first), str(second)]
    seen = [runs.inputs(targets=names).identity, runs.inputs(targets=names[::-1]).identity]
    (first / "model" / "weights").write_text("trained again")
    seen.append(runs.inputs(targets=names).identity)
    (runs.pivot / "config.json").write_text('{"changed": true}')
    seen.append(runs.inputs(targets=names).identity)
    runs.add("sft", objective="sft")
    seen.append(runs.inputs(targets=names).identity)
    assert len({json.dumps(one) for one in seen}) == 5
    assert runs.inputs(targets=names).identity == seen[-1]


def test_bare_models_have_no_records(runs, tmp_path):
    other = tmp_path / "models" / "other"
    other.mkdir()
    (other / "config.json").write_text("{}")
    inputs = runs.inputs(targets=[str(runs.pivot), str(other)], base=str(runs.pivot))
    assert [target.name for target in inputs.targets] == ["pivot", "other"]
    assert (inputs.runs, inputs.data, inputs.sft, inputs.heldout_won) == ([], None, None, [])
    mixed = runs.inputs(targets=[str(runs.add("a", "a")), str(other)])
    assert mixed.runs == []
    assert mixed.base == runs.pivot
    assert runs.inputs(targets=str(other)).base is None


def test_targets_called_alike_are_told_apart(runs):
    folders = [str(runs.add(f"{seed}", "a", group=str(seed))) for seed in range(2)]
    assert [target.name for target in runs.inputs(targets=folders).targets] == ["a_1", "a_2"]


@pytest.mark.parametrize(
    "trouble", ["two pivots", "missing base", "missing pivot", "sft is a model", "sft is several runs"]
)
def test_inputs_that_do_not_fit(runs, tmp_path, trouble):
    other = tmp_path / "other pivot"
    other.mkdir()
    first = str(runs.add("a", "a", pivot=tmp_path / "gone" if trouble == "missing pivot" else None))
    second = str(runs.add("b", "b", pivot=other))
    settings = {
        "two pivots": {"targets": [first, second]},
        "missing base": {"targets": [first], "base": "/nothing/here"},
        "missing pivot": {"targets": [first]},
        "sft is a model": {"targets": [first], "sft": str(runs.pivot)},
        "sft is several runs": {"targets": [first], "sft": str(runs.runs)},
    }
    said = {
        "two pivots": "several pivots",
        "missing base": "base=/nothing/here: no such folder",
        "missing pivot": "gone: no such folder",
        "sft is a model": "sft=.*not a run of train.py",
        "sft is several runs": "sft=.*not a run of train.py",
    }
    with pytest.raises(UserError, match=said[trouble]):
        runs.inputs(**settings[trouble])


def test_a_plan_downloads_nothing(monkeypatch):
    asked = []

    def snapshot(path, *, local_files_only, **more):
        asked.append((path, local_files_only))
        raise FileNotFoundError(f"{path} is not cached")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    config = MergeConfig(targets=["org/one", "org/two"], base="org/base", plan=True)
    with pytest.raises(UserError) as caught:
        find_inputs(config)
    assert asked == [("org/one", True), ("org/two", True), ("org/base", True)]
    assert [problem.split(": ")[0] for problem in caught.value.problems] == [
        "targets[0]=org/one",
        "targets[1]=org/two",
        "base=org/base",
    ]
    assert all("a plan downloads nothing" in problem for problem in caught.value.problems)
    with pytest.raises(UserError, match="cannot be had from the hub: org/one is not cached"):
        find_inputs(replace(config, plan=False))
    assert asked[3:] == [("org/one", False), ("org/two", False), ("org/base", False)]
