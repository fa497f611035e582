"""The models that a merge is compared with carry what stage 1 recorded of them."""

import json

from fusion.config.schema import ModelConfig
from fusion.evaluation.compare import ScoredModel, comparison_row, models_of_merge
from fusion.evaluation.score import Scores
from fusion.tracking.inputs import MergeInputs
from fusion.tracking.stage1 import TargetRun

REPORT = {"alignment": {"a": {"covered": 0.9}}, "who_won": {"pivot": 1, "a": 2}}


def stage1_run(root, name, **result):
    folder = root / name
    folder.mkdir()
    source = {"name": name, "path": "/s"}
    lineage = {"pivot": {"name": "pivot", "path": "/p"}, "sources": [source], "strong_skills": {name: ["add"]}}
    (folder / "lineage.json").write_text(json.dumps(lineage))
    return TargetRun(folder, {"name": name, "objective": "fusion", **result})


def test_targets_carry_recipe_and_report_and_runs_of_before_have_none(tmp_path):
    recipe = {"alignment": {"name": "ms"}}
    runs = [stage1_run(tmp_path, "a", recipe=recipe, report=REPORT), stage1_run(tmp_path, "b")]
    sft = stage1_run(tmp_path, "sft", report={"who_won": {"references": 3}})
    models = models_of_merge(MergeInputs([], None, runs, sft))
    assert [(one.kind, one.model.name) for one in models] == [
        ("pivot", "pivot"),
        ("source", "a"),
        ("source", "b"),
        ("sft", "sft"),
        ("target", "a"),
        ("target", "b"),
    ]
    assert [one.alignment for one in models] == [{}, {}, {}, {}, REPORT, {}]
    assert [one.recipe for one in models[4:]] == [recipe, {}]
    assert models[4].strong_skills == ("add",)


def test_a_row_has_what_its_model_carries():
    scored = ScoredModel("target", ModelConfig(name="a", path="/a"), ("add",), {"template": "shared"}, REPORT)
    row = comparison_row(scored, Scores({"average": 0.5}, {"add": 4}, 0.1, {}), seed=3, command="python merge.py")
    assert (row.kind, row.model, row.seed, row.path, row.strong_skills) == ("target", "a", 3, "/a", ("add",))
    assert (row.alignment, row.parameters) == (REPORT, {"template": "shared"})
