"""From settings to fused targets: every step once, through the cache, with a report that adds up."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from stage1_settings import DIALOGUES, settings, source_of

from fusion.config import UserError
from fusion.config.schema import AlignmentConfig, DataConfig, FusionConfig, ObjectiveConfig, SourceConfig
from fusion.dialogues.dialogue import chat
from fusion.training.prepare import prepare, sources


@pytest.fixture
def config(tmp_path, tiny_pivot, tiny_source):
    return settings(tmp_path, tiny_pivot, tiny_source)


def refuse(*_, **__):
    raise AssertionError("this was done before")


def test_the_report_adds_up(config):
    prepared = prepare(config)
    report, fused = prepared.report, prepared.fused
    counts = report["dialogues"]
    assert counts["train"] + counts["heldout"] == len(DIALOGUES)
    assert counts["dropped"] == {}
    assert sum(report["who_won"].values()) == counts["train"] == report["trained_on"] == len(fused)
    assert set(report["who_won"]) <= {"pivot", "source"}
    assert set(report["rows_won"]) == {"pivot", "source"}
    assert sum(report["rows_won"].values()) == pytest.approx(1, abs=1e-5)
    assert json.loads(json.dumps(report)) == report
    assert report["supervised_rows"] == fused.num_rows.sum()
    assert report["fallback_share"] == pytest.approx(report["fallback_rows"] / report["supervised_rows"], abs=1e-6)
    assert 0.2 < report["alignment"]["source"]["aligned"] <= 1
    assert set(prepared.inputs) == {"pivot", "source", "dialogues"}
    assert prepared.tokenizer.chat_template
    assert len(prepared.heldout) == counts["heldout"]
    assert report["heldout_won"] == len(prepared.heldout_won)
    assert set(prepared.heldout_won) <= set(prepared.heldout)


def test_every_target_row_is_a_distribution(config):
    fused = prepare(config).fused
    for number in range(len(fused)):
        targets = fused[number].targets
        sums = np.add.reduceat(targets.weights_E, targets.indptr_R[:-1])
        np.testing.assert_allclose(sums, 1, atol=1e-6)
        assert len(targets) == len(fused[number].rows_R)


def test_a_second_call_does_nothing_again(config, monkeypatch):
    first = prepare(config)
    for name in ("place", "write_shard"):
        monkeypatch.setattr(f"fusion.teaching.teach.{name}", refuse)
    monkeypatch.setattr("fusion.alignment.pair._build", refuse)
    monkeypatch.setattr("fusion.training.fusing.fuse", refuse)
    second = prepare(config)
    assert second.fused.folder == first.fused.folder
    assert second.report == first.report
    assert second.inputs == first.inputs


def test_a_change_of_the_objective_costs_no_pass(config, monkeypatch):
    prepare(config)
    monkeypatch.setattr("fusion.teaching.teach.place", refuse)
    prepare(replace(config, objective=ObjectiveConfig(ce_weight=0.9), seed=7))
    prepare(replace(config, fusion=FusionConfig(name="source_only")))
    prepare(replace(config, alignment=AlignmentConfig(name="em", fallback="skip")))


def test_sft_reads_no_teacher(config, monkeypatch):
    monkeypatch.setattr("fusion.teaching.teach.place", refuse)
    nowhere = SourceConfig(name="source", path="/nowhere")
    prepared = prepare(replace(config, objective=ObjectiveConfig(name="sft"), source=nowhere))
    assert prepared.report["who_won"] == {"references": len(prepared.fused)}
    assert prepared.heldout_won == []
    assert all(prepared.fused[number].targets.is_empty_R.all() for number in range(len(prepared.fused)))
    assert set(prepared.inputs) == {"pivot", "dialogues"}


def test_a_model_taught_by_itself_always_wins_as_the_pivot(config, tiny_pivot):
    twin = replace(tiny_pivot, name="twin")
    prepared = prepare(replace(config, source=source_of(twin)))
    assert prepared.report["who_won"] == {"pivot": len(prepared.fused)}
    aligned = prepared.report["alignment"]["twin"]
    assert aligned["supervised_rows"] == prepared.fused.num_rows.sum()
    assert aligned["aligned"] == aligned["covered"] == 1
    assert prepared.report["fallback_rows"] == 0
    assert prepared.heldout_won == []


def test_the_share_of_pivot_won_dialogues(config, tiny_pivot):
    twin = replace(config, source=source_of(replace(tiny_pivot, name="twin")))
    counts = {
        share: len(prepare(replace(twin, fusion=FusionConfig(keep_pivot_won=share))).fused)
        for share in (1.0, 0.5, 0.0)
    }
    assert counts[1.0] > counts[0.5] > counts[0.0] == 0


@pytest.mark.parametrize("fallback", ["gold", "pivot", "skip"])
def test_fallbacks(config, fallback):
    chosen = replace(
        config, alignment=AlignmentConfig(name="em", fallback=fallback), fusion=FusionConfig(name="source_only")
    )
    prepared = prepare(chosen)
    fused = prepared.fused
    assert prepared.report["fallback_rows"] > 0
    empty = sum(int(fused[number].targets.is_empty_R.sum()) for number in range(len(fused)))
    assert empty == (prepared.report["fallback_rows"] if fallback == "skip" else 0)


def test_native_templates_align_the_same_contents(config):
    shared, native = prepare(config), prepare(replace(config, template="native"))
    assert shared.fused.folder != native.fused.folder
    assert native.report["supervised_rows"] == shared.report["supervised_rows"]
    aligned = [one.report["alignment"]["source"]["aligned"] for one in (shared, native)]
    assert aligned[0] == pytest.approx(aligned[1], abs=0.05)


def test_several_sources_fused_into_one_target(config, tiny_source, tiny_pivot):
    members = {"a": {"path": tiny_source.path}, "b": {"path": tiny_pivot.path, "name": "other"}}
    both = replace(config, source=SourceConfig(name="all", path="", members=members))
    assert [source.name for source in sources(both)] == ["a", "other"]
    prepared = prepare(both)
    assert set(prepared.report["alignment"]) == {"a", "other"}
    assert set(prepared.report["who_won"]) <= {"pivot", "a", "other"}


def test_wrong_names_are_told_before_anything_runs(config, monkeypatch):
    monkeypatch.setattr("fusion.teaching.teach.place", refuse)
    with pytest.raises(UserError, match=r"fusion\.name=nope"):
        prepare(replace(config, fusion=FusionConfig(name="nope")))


def test_a_changed_function_of_the_user_is_a_new_store(config, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    folders = []
    for name, chosen in (("first_try", 0), ("second_try", 1)):
        (tmp_path / f"{name}.py").write_text(
            f"def choose(ce_UM):\n    return [[float(m == {chosen}) for m in range(2)] for _ in ce_UM]\n"
        )
        prepared = prepare(replace(config, fusion=FusionConfig(name=f"{name}.choose")))
        folders.append(prepared.fused.folder)
        assert list(prepared.report["who_won"]) == [("pivot", "source")[chosen]]
    assert folders[0] != folders[1]


def test_dialogues_that_cannot_be_read_are_counted(tmp_path, tiny_pivot, tiny_source):
    bad = [chat("q", "<|im_end|>"), chat("<|im_end|>", "q"), chat("long " * 200, "too late")]
    config = settings(tmp_path, tiny_pivot, tiny_source, [*DIALOGUES, *bad])
    config = replace(config, data=replace(config.data, max_length=300))
    dropped = prepare(config).report["dialogues"]["dropped"]
    assert sum(dropped.values()) == 3
    assert any("special token" in reason for reason in dropped)
    assert any("max_length" in reason for reason in dropped)


@pytest.mark.parametrize(
    ("dialogues", "heldout", "reason"),
    [
        ([chat("q", "a<|im_end|>")], 0.0, "1 x a message contains the special token"),
        (DIALOGUES, 1.0, "all are held out"),
    ],
)
def test_nothing_to_train_on_is_the_users_problem(tmp_path, tiny_pivot, tiny_source, dialogues, heldout, reason):
    config = settings(tmp_path, tiny_pivot, tiny_source, dialogues)
    config = replace(config, data=replace(config.data, heldout_fraction=heldout))
    with pytest.raises(UserError, match=rf"data\.path=.*no dialogue is left to train on \({reason}"):
        prepare(config)


def test_repeated_dialogues_count_twice(tmp_path, tiny_pivot, tiny_source):
    config = settings(tmp_path, tiny_pivot, tiny_source, [*DIALOGUES, *DIALOGUES])
    once = prepare(settings(tmp_path / "once", tiny_pivot, tiny_source))
    twice = prepare(config)
    assert len(twice.fused) == 2 * len(once.fused)
    assert twice.fused.examples == once.fused.examples * 2


def test_a_moved_model_is_the_same_model(config, tiny_source, tmp_path):
    first = prepare(config)
    shutil.copytree(tiny_source.path, tmp_path / "moved")
    moved = prepare(replace(config, source=source_of(replace(tiny_source, path=str(tmp_path / "moved")))))
    assert moved.fused.folder == first.fused.folder


def test_equal_settings_give_equal_bytes_anywhere(config, tmp_path):
    first = prepare(config)
    other = replace(config, paths=replace(config.paths, cache=str(tmp_path / "elsewhere")))
    second = prepare(other)
    assert first.fused.folder.name == second.fused.folder.name
    names = sorted(path.name for path in first.fused.folder.iterdir())
    assert all((first.fused.folder / name).read_bytes() == (second.fused.folder / name).read_bytes() for name in names)


def test_data_settings_reach_the_reader(config):
    assert isinstance(config.data, DataConfig)
    limited = prepare(replace(config, data=replace(config.data, limit=6)))
    counts = limited.report["dialogues"]
    assert counts["train"] + counts["heldout"] == 6
    assert Path(config.paths.cache).is_dir()
