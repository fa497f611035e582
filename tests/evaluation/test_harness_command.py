"""`evaluate.py scorers=[lm_eval]` and the harness's own command line find the same numbers of one merged folder.

Skipped where the harness is not installed.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from waiting import PATIENCE

from fusion.dialogues.dialogue import read_jsonl
from fusion.merging import merge_folders

pytest.importorskip("lm_eval", reason="the EleutherAI harness is not installed (extra `lm-eval`)")

EVALUATE = Path(__file__).resolve().parents[2] / "evaluate.py"
BATCH_SIZE = 4
QUESTIONS = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{train: {train}, test: {test}}}}}
training_split: train
fewshot_split: train
test_split: test
doc_to_text: "{{{{question}}}}"
metadata: {{version: 1}}
"""
CHOICE = """
output_type: multiple_choice
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
num_fewshot: {shots}
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
GENERATE = """
output_type: generate_until
doc_to_target: "{{{{choices[label]}}}}"
num_fewshot: {shots}
generation_kwargs: {{until: ["\\n"], do_sample: false, max_gen_toks: 24}}
filter_list: [{{name: answer, filter: [{{function: regex, regex_pattern: '(\\S.*)'}}, {{function: take_first}}]}}]
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
  - {{metric: bleu, aggregation: bleu, higher_is_better: true}}
"""
TASKS = {
    "world_choice": (CHOICE, 0),
    "world_choice_shots": (CHOICE, 2),
    "world_generate": (GENERATE, 0),
}


def questions(path, dialogues):
    """Each dialogue's answer among those of its neighbours, in turn at the first, second and third place."""
    answers = [one.messages[1].content for one in dialogues]
    rows = []
    for place, one in enumerate(dialogues):
        wrong = [answers[(place + step) % len(answers)] for step in (1, 2)]
        choices = [*wrong[: place % 3], answers[place], *wrong[place % 3 :]]
        rows.append({"question": one.messages[0].content, "choices": choices, "label": place % 3})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def tasks(smoke_world, tmp_path_factory):
    """Tasks about the world's own questions of one turn."""
    folder = tmp_path_factory.mktemp("tasks")
    files = {}
    for split in ("train", "test"):
        dialogues = [one for one in read_jsonl(smoke_world.dialogues_path(split)) if len(one.messages) == 2]
        files[split] = questions(folder / f"{split}.jsonl", dialogues[:48])
    for name, (kind, shots) in TASKS.items():
        (folder / f"{name}.yaml").write_text(QUESTIONS.format(name=name, **files) + kind.format(shots=shots))
    return folder


@pytest.fixture(scope="module")
def merged(smoke_world, tmp_path_factory):
    """A merge of two disturbed copies of the world's pivot, rounded to its dtype."""
    folder = tmp_path_factory.mktemp("merged")
    pivot = smoke_world.model_path("pivot")
    targets = [disturbed(pivot, folder / f"target_{seed}", seed) for seed in (0, 1)]
    merge_folders("task_arithmetic", pivot, targets, folder / "model", weight=0.5)
    return folder / "model"


def disturbed(pivot, folder, seed):
    folder.mkdir()
    for file in pivot.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    random = torch.Generator().manual_seed(seed)
    weights = load_file(pivot / "model.safetensors")
    moved = {name: one + 0.01 * torch.randn(one.shape, generator=random).to(one) for name, one in weights.items()}
    save_file(moved, folder / "model.safetensors", {"format": "pt"})
    return folder


def run(folder, *command):
    quiet = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "datasets"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, **quiet},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def of_ours(folder, model, tasks):
    """Metrics by task and scores by item, of `evaluate.py`."""
    arguments = [f"models=[{model}]", "scorers=[lm_eval]", f"lm_eval.tasks=[{','.join(TASKS)}]"]
    arguments += [f"lm_eval.include_path={tasks}", f"lm_eval.batch_size={BATCH_SIZE}", "hydra.run.dir=ours"]
    run(folder, str(EVALUATE), *arguments)
    (scores,) = json.loads((folder / "ours/scores.json").read_text())["lm_eval"]["models"]
    items = map(json.loads, (folder / "ours/items.jsonl").read_text().splitlines())
    return scores["facts"]["results"], {one["item"]: one["score"] for one in items}


def of_the_harness(folder, model, tasks):
    """The same, of the harness's command line as a user would type it."""
    arguments = ["--model", "hf", "--model_args", f"pretrained={model}", "--apply_chat_template"]
    arguments += ["--tasks", ",".join(TASKS), "--include_path", str(tasks), "--batch_size", str(BATCH_SIZE)]
    run(folder, "-m", "lm_eval", *arguments, "--device", "cpu", "--log_samples", "--output_path", "theirs")
    (results,) = (folder / "theirs").rglob("results_*.json")
    lines = {
        task: [json.loads(line) for file in results.parent.glob(f"samples_{task}_2*.jsonl") for line in file.open()]
        for task in TASKS
    }
    return json.loads(results.read_text())["results"], lines


def metrics(values):
    """Numbers of a task by the names of its metrics; standard errors apart, which are not asked for here."""
    return {name: value for name, value in values.items() if isinstance(value, int | float) and "_stderr" not in name}


def test_both_find_the_same_numbers(merged, tasks, tmp_path):
    ours, scores = of_ours(tmp_path, merged, tasks)
    theirs, lines = of_the_harness(tmp_path, merged, tasks)
    assert {task: metrics(values) for task, values in ours.items()} == {task: metrics(theirs[task]) for task in TASKS}
    shown = {task: "exact_match" if task == "world_generate" else "acc_norm" for task in TASKS}
    assert scores == {f"{task}:{one['doc_id']}": one[shown[task]] for task in TASKS for one in lines[task]}
    for task in TASKS:
        found = [one[shown[task]] for one in lines[task]]
        assert len(found) == 48
        assert 0 < sum(found) < 48, "a score that every model has would compare nothing"
