"""The EleutherAI harness on a live model; skipped where it is not installed."""

import json

import pytest

from fusion.config import UserError
from fusion.config.evaluation import LMEvalConfig
from fusion.evaluation.candidate import Candidate

lm_eval = pytest.importorskip("lm_eval", reason="the EleutherAI harness is not installed")

CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: 0
doc_to_choice: ["yes", "no", "river"]
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata: {{version: 3}}
"""


@pytest.fixture
def settings(tmp_path):
    data = tmp_path / "questions.jsonl"
    words = ("river", "wire", "pole", "lines", "space", "answer", "model", "yes", "no", "which")
    data.write_text("".join(json.dumps({"question": f"say {word}"}) + "\n" for word in words))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "tiny_choice.yaml").write_text(CHOICE.format(file=data))
    return LMEvalConfig(tasks=["tiny_choice"], include_path=str(tasks), batch_size=4)


def test_scores_are_those_of_the_harness_alone(tiny_pivot, settings):
    """The same folder through the harness's own loading: item for item the same."""
    from lm_eval.tasks import TaskManager

    from fusion.evaluation.harness import Harness, require_harness

    require_harness(settings)
    sheet = Harness(settings).score(Candidate.of_folder(tiny_pivot))
    alone = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": tiny_pivot.path, "dtype": "float32"},
        tasks=["tiny_choice"],
        task_manager=TaskManager(include_path=settings.include_path),
        apply_chat_template=True,
        bootstrap_iters=0,
        batch_size=1,
        device="cpu",
    )
    expected = {f"tiny_choice:{line['doc_id']}": line["acc"] for line in alone["samples"]["tiny_choice"]}
    assert {one.item: one.score for one in sheet.items} == expected
    assert sheet.result().mean == pytest.approx(alone["results"]["tiny_choice"]["acc,none"])
    assert sheet.facts["versions"] == {"tiny_choice": 3}


def test_the_chat_template_is_applied(tiny_pivot, settings):
    from dataclasses import replace

    from fusion.evaluation.harness import Harness

    candidate = Candidate.of_folder(tiny_pivot)
    asked = []
    tokenizer = candidate.reader.tokenizer
    original = type(tokenizer).apply_chat_template

    def noted(self, *arguments, **options):
        asked.append(arguments)
        return original(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(tokenizer), "apply_chat_template", noted)
        Harness(replace(settings, chat_template=False)).score(candidate)
        assert not asked
        Harness(settings).score(candidate)
        assert asked


def test_unknown_tasks_are_named(settings):
    from dataclasses import replace

    from fusion.evaluation.harness import require_harness

    with pytest.raises(UserError, match="no task tiny_chioce"):
        require_harness(replace(settings, tasks=["tiny_choice", "tiny_chioce"]))
