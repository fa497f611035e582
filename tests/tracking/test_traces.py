"""What is read beside the scores: found where it is, thinned without a bias, and left out where it cannot be read."""

import json
import shutil
from dataclasses import replace

import pytest
from recorded_sweep import METHODS, TARGETS, record_sweep
from sample_rows import row

from fusion.tracking.ancestry import Piece
from fusion.tracking.curves import Curve
from fusion.tracking.drawn import drawings, script_json
from fusion.tracking.evaluations import MOST_MERGES, sampled_answers
from fusion.tracking.grouping import summarise
from fusion.tracking.hyperparameters import varying_settings
from fusion.tracking.rows import read_runs
from fusion.tracking.traces import NO_TRACES, read_traces


@pytest.fixture
def sweep(tmp_path):
    return record_sweep(tmp_path / "sweep", 4)


def read(folder):
    rows, _ = read_runs([folder])
    return rows, read_traces([folder], rows)


def test_everything_is_found_even_in_a_folder_that_was_moved(sweep, tmp_path):
    before = read(sweep)
    moved = tmp_path / "elsewhere" / sweep.name
    moved.parent.mkdir()
    shutil.move(sweep, moved)
    for rows, traces in (before, read(moved)):
        made = {one.path for one in rows if one.kind in ("target", "merged")}
        assert set(traces.curves) == {one.path for one in rows if one.kind == "target"}
        assert set(traces.coefficients) == {one.path for one in rows if one.kind == "merged"}
        assert set(traces.ancestries) == made
        assert [len(one.tests) for one in traces.evaluations] == [3]
    assert before[1].coefficients == read(moved)[1].coefficients


def test_coefficients_are_those_of_the_merge_by_layer(sweep):
    rows, traces = read(sweep)
    for one in rows:
        if one.kind == "merged":
            found = traces.coefficients[one.path]
            assert found.targets == TARGETS
            assert len(found.layers) == len(found.values) == 6
            assert all(len(values) == len(TARGETS) for values in found.values)
    linear = next(traces.coefficients[one.path] for one in rows if one.strategy == "linear")
    assert {value for values in linear.values for value in values} == {0.5}


def test_a_merge_is_led_back_to_sources_and_dialogues(sweep):
    rows, traces = read(sweep)
    merged = next(one for one in rows if one.kind == "merged")
    edges = traces.ancestries[merged.path].edges
    made = {piece: {first for first, second in edges if second == piece} for _, piece in edges}
    (last,) = (piece for piece in made if piece.stage == "merged")
    assert {piece.stage for piece in made[last]} == {"target", "pivot"}
    target = next(piece for piece in made[last] if piece.name == "tiny_a")
    assert {piece.stage for piece in made[target]} == {"distributions", "pivot"}
    distributions = next(piece for piece in made[target] if piece.stage == "distributions")
    assert Piece("source", "tiny_a", "a" * 64) in made[distributions]
    assert Piece("source", "tiny_b", "b" * 64) not in made[distributions]


def test_what_cannot_be_read_is_left_out(sweep):
    (sweep / "targets" / "source=tiny_a" / "csv" / "metrics.csv").write_text("step,train/loss\n3,0.5\nx,0.4\n9,to")
    (sweep / "targets" / "source=tiny_b" / "csv" / "metrics.csv").unlink()
    (sweep / "evaluation" / "scores.json").write_text("{")
    for file in (sweep / "merges").glob("*/lineage.json"):
        file.write_text("[]")
    for file in (sweep / "merges").glob("*/result.json"):
        result = json.loads(file.read_text("utf-8"))
        result.pop("merge", None)  # as earlier versions recorded it
        file.write_text(json.dumps(result))
    rows, traces = read(sweep)
    assert len(rows) == 3 + len(TARGETS) + len(METHODS)
    (curve,) = traces.curves.values()
    assert (curve.steps, curve.metrics) == ((3, 9), {"loss": (0.5, None)})
    assert (dict(traces.coefficients), list(traces.evaluations)) == ({}, [])
    comparison = summarise(rows)
    drawn = drawings(comparison, varying_settings(comparison), traces)
    assert (drawn["heats"]["merges"], drawn["lineage"]["runs"]) == ([], [])


def test_thinning_keeps_means_and_the_last_step():
    curve = Curve(tuple(range(1, 1001)), {"loss": tuple(float(step) for step in range(1, 1001))})
    thin = curve.thinned(100)
    assert (len(thin.steps), thin.steps[-1]) == (100, 1000)
    assert thin.metrics["loss"][0] == 5.5
    assert sum(thin.metrics["loss"]) / 100 == pytest.approx(500.5)
    assert curve.thinned(1000) == curve


def test_a_setting_of_one_method_at_one_value_does_not_vary():
    rows = [
        row("sce", "merged", 0.5, path="1", parameters={"tau": 0.1, "targets": {"optim": {"lr": 0.1}}}),
        row("sce", "merged", 0.6, path="2", parameters={"tau": 0.1, "targets": {"optim": {"lr": 0.2}}}),
        row("ties", "merged", 0.7, path="3", parameters={"density": 0.2, "targets": {"optim": {"lr": 0.2}}}),
        row("tiny_a", "target", 0.4, path="4", parameters={"optim": {"lr": 0.2}}),
    ]
    comparison = summarise(rows)
    found = {one.name: one.values for one in varying_settings(comparison)}
    assert list(found) == ["merge", "optim.lr"]
    by_path = {model.rows[0].path: value for model, value in zip(comparison.models, found["optim.lr"], strict=True)}
    assert by_path == {"1": 0.1, "2": 0.2, "3": 0.2, "4": 0.2}


@pytest.mark.parametrize(("gap", "stands_out"), [(0.01, False), (0.3, True)])
def test_a_star_needs_more_than_noise(gap, stands_out):
    first, second = row("sce", "merged", 0.5 + gap), row("linear", "merged", 0.5)
    comparison = summarise([first, second, row("pivot", "pivot", 0.1)])
    assert ("facts" in comparison.standouts) is ("average" in comparison.standouts) is stands_out
    assert [model.label for model in comparison.contest] == ["sce", "linear"]


def test_the_numbers_cannot_end_their_script():
    comparison = summarise([row("</script><!--", "merged", 0.5), row("b", "merged", 0.4)])
    text = script_json(drawings(comparison, varying_settings(comparison), NO_TRACES))
    assert "<" not in text
    assert "</script><!--" in [model["label"] for model in json.loads(text)["models"]]


def test_answers_of_jobs_stand_side_by_side():
    """Question by question: the right answer, the pivot, the leading merges, then the others."""
    asked = {"category": "add", "question": "1 + 1?", "reference": "2"}
    rows = [row("tiny_a", "target", 0.5), row("pivot", "pivot", 0.4)]
    rows += [row(f"m{number}", "merged", 0.5 + number / 100) for number in range(MOST_MERGES + 2)]
    rows = [replace(one, samples=({**asked, "answer": one.model},)) for one in rows]
    found = sampled_answers([*rows, row("sft", "sft", 0.5)])
    (question,) = found.questions
    assert (question.category, question.turns, found.tests) == ("add", ("1 + 1?",), ())
    leading = [f"m{MOST_MERGES + 1 - place}" for place in range(MOST_MERGES)]
    answers = [answer["turns"] for answer in question.answers]
    assert answers == [["2"], ["pivot"], *[[one] for one in leading], ["tiny_a"]]
    assert sampled_answers([row("pivot", "pivot", 0.4)]) is None
