"""What loggers show beside the curves; W&B's own files are read in tests/end_to_end/test_wandb.py."""

from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fusion.tracking.mirror import Piece, Table, mirror_result, summary, tables

ROWS = [
    {"model": "pivot", "kind": "pivot", "scores": {"add": 0.25, "average": 0.25}, "nll_per_byte": 0.5},
    {"model": "sce", "kind": "merged", "scores": {"add": 0.75, "units": None, "average": 0.75}, "nll_per_byte": None},
]
MERGE = {
    "coefficients": {"w": [0.25, 0.75]},
    "mean_coefficients": [0.25, 0.75],
    "delta_norms": [1.0, 2.0],
    "cosines": [[1.0, 0.5], [0.5, 1.0]],
    "sign_conflicts": 0.5,
    "shares": {"selected": 0.1},
    "events": {"nothing moved": ["w"]},
    "tensors": {"w": {"elements": 4, "norms": [1.0, 2.0], "sign_conflicts": 0.5, "shares": {"selected": 0.1}}},
    "speed": 3e9,
}
RESULT = {"comparison": ROWS, "merge": MERGE, "targets": ["a", "b"], "scale": 2.0}


def test_tables_hold_every_model_and_every_tensor():
    found = tables(RESULT)
    assert found["scores"] == Table(
        ["model", "kind", "add", "average", "units", "nll_per_byte"],
        [["pivot", "pivot", 0.25, 0.25, None, 0.5], ["sce", "merged", 0.75, 0.75, None, None]],
    )
    assert found["coefficients"] == Table(["tensor", "a", "b"], [["w", 0.25, 0.75]])
    columns = ["tensor", "elements", "norm of a", "norm of b", "sign_conflicts", "selected"]
    assert found["deltas"] == Table(columns, [["w", 4, 1.0, 2.0, 0.5, 0.1]])
    assert found["cosines"] == Table(["target", "a", "b"], [["a", 1.0, 0.5], ["b", 0.5, 1.0]])
    assert found["events"] == Table(["event", "tensor"], [["nothing moved", "w"]])
    assert tables({"comparison": []}) == {}


def test_answers_stand_side_by_side():
    asked = {"category": "add", "question": "1 | 1?\nSay", "reference": "2"}
    rows = [{**ROWS[0], "samples": [{**asked, "answer": "3"}]}, {**ROWS[1], "samples": []}]
    answers = tables({"comparison": rows})["answers"]
    columns = ["category", "question", "right answer", "pivot (pivot)", "sce (merged)"]
    assert answers == Table(columns, [["add", "1 | 1?\nSay", "2", "3", None]])
    assert answers.to_markdown().splitlines()[2] == "| add | 1 \\| 1? Say | 2 | 3 | - |"
    assert "answers" not in tables(RESULT)


def test_the_summary_is_of_the_last_model():
    found = dict(summary(RESULT))
    assert (found["score/add"], found["scale"], found["coefficient/b"]) == (0.75, 2.0, 0.75)
    assert (found["delta_norm/b"], found["merge/selected"], found["merge/speed"]) == (2.0, 0.1, 3e9)


def test_names_of_artifacts_have_only_what_wandb_allows():
    assert Piece("model", "org/a model", "0123456789abcdef").artifact_name == "model-org_a_model-0123456789ab"


def test_tensorboard_shows_the_tables(tmp_path):
    (tmp_path / "model").mkdir()
    logger = TensorBoardLogger(tmp_path, name=None, version="tensorboard")
    mirror_result([logger], "merge", tmp_path, RESULT, {})
    logger.finalize("success")
    curves = EventAccumulator(str(tmp_path / "tensorboard"))
    curves.Reload()
    (scores,) = curves.Tensors("scores/text_summary")
    assert b"| sce | merged | 0.75 | 0.75 | - | - |" in scores.tensor_proto.string_val[0]
