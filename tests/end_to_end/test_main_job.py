"""What the two commands leave behind."""

import json
import re

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusion.dialogues.dialogue import read_jsonl
from fusion.tracking.drawn import script_json

from .conftest import METHODS


def result(folder):
    return json.loads((folder / "result.json").read_text())


def job_folders(sweep):
    return sorted(path.parent for path in sweep.glob("*/result.json"))


def test_every_job_leaves_a_full_record(targets, sft, merges):
    for folder in [*job_folders(targets), sft, *job_folders(merges)]:
        found = result(folder)
        assert found["status"] == "finished"
        assert found["timings_s"]
        assert found["peak_memory_bytes"] > 0
        lineage = json.loads((folder / "lineage.json").read_text())
        assert lineage["command"] == (folder / "command.txt").read_text().strip()
        assert lineage["versions"]["torch"]
        assert lineage["inputs"]
        assert (folder / "config.yaml").read_text().startswith("seed:")


def test_sweep_folders_name_what_was_swept(targets, merges):
    assert [folder.name for folder in job_folders(targets)] == [f"source=tiny_{x}" for x in "abc"]
    assert {folder.name for folder in job_folders(merges)} == {f"merge={method}" for method in METHODS}


def test_sweep_shares_world_and_pivot_through_the_cache(workplace, targets):
    count = json.loads((workplace.root / "stages_of_the_sweep.json").read_text())
    assert (count["world"], count["teaching"], count["alignment"], count["fusion"]) == (1, 4, 3, 3)


def test_comparison_lists_every_model_with_scores(merges):
    rows = json.loads((merges / "comparison.json").read_text())
    kinds = [row["kind"] for row in rows]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {
        "pivot": 1,
        "source": 3,
        "sft": 1,
        "target": 3,
        "merged": len(METHODS),
    }
    assert {row["strategy"] for row in rows if row["kind"] == "merged"} == set(METHODS)
    for row in rows:
        assert {"model", "kind", "strategy", "seed", "path", "scores", "nll_per_byte"} <= row.keys()
        skills = {skill: value for skill, value in row["scores"].items() if skill != "average"}
        assert all(0 <= value <= 1 for value in skills.values())
        assert row["scores"]["average"] == pytest.approx(sum(skills.values()) / len(skills))
        assert row["nll_per_byte"] > 0
    page = (merges / "comparison.html").read_text()
    assert all(method in page for method in METHODS)
    assert 'src="http' not in page
    assert 'href="http' not in page
    assert all(len(row["samples"]) == len(row["scores"]) - 1 for row in rows)
    answers = [sample["answer"] for row in rows if row["kind"] == "target" for sample in row["samples"]]
    assert all(script_json({"": answer})[4:-1] in page for answer in answers)
    assert "| model |" in (merges / "comparison.md").read_text()


def test_searched_scale_is_the_best_of_those_tried(merges):
    for folder in job_folders(merges):
        found = result(folder)
        best = min(found["scale_search"], key=lambda pair: pair[1])
        assert found["scale"] == pytest.approx(best[0])
        assert len(found["scale_search"]) >= 5


def test_merged_model_answers_through_plain_transformers(workplace, merges):
    """The greedy answer of generate() is right exactly where the teacher-forced score says so."""
    folder = merges / "merge=sce" / "model"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    (world,) = (workplace.cache / "world").glob("[!.]*")
    rows = json.loads((merges / "comparison.json").read_text())
    (sce,) = [row for row in rows if row["strategy"] == "sce"]
    dialogues = read_jsonl(world / "dialogues" / "test.jsonl")
    skill = max((name for name in sce["scores"] if name != "average"), key=sce["scores"].__getitem__)
    asked = [dialogue for dialogue in dialogues if dialogue.category == skill]
    right = 0
    for dialogue in asked:
        messages = dialogue.to_json()["messages"]
        inputs = tokenizer.apply_chat_template(
            messages[:-1], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        answer = model.generate(**inputs, max_new_tokens=48, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        right += tokenizer.decode(answer, skip_special_tokens=True).strip() == messages[-1]["content"]
    assert right > 0
    assert right / len(asked) == pytest.approx(sce["scores"][skill], abs=0.02)


def test_targets_are_ordinary_model_folders(targets):
    folder = targets / "source=tiny_b" / "model"
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "README.md"} <= names
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template
    assert AutoModelForCausalLM.from_pretrained(folder).config.architectures == ["LlamaForCausalLM"]


def test_the_merged_model_s_card_has_scores_and_sources(merges):
    """The verification below has the card with it: it came after the manifest."""
    folder = merges / "merge=linear"
    card, result = (folder / "model" / "README.md").read_text(), json.loads((folder / "result.json").read_text())
    rows = {(row["kind"], row["model"]): row["scores"] for row in result["comparison"]}
    for (kind, model), scores in rows.items():
        assert f"| {kind} {model} | {' | '.join(f'{score:.4g}' for score in scores.values())} |" in card
    assert {kind for kind, _ in rows} >= {"pivot", "source", "target", "merged"}
    for name in ("tiny_a", "tiny_b", "tiny_c"):
        assert re.search(rf"^\| target \| {name} \| `.*` \| {name} \(`.*`\) \|$", card, flags=re.M), name
    assert f"```sh\n{(folder / 'command.txt').read_text().strip()}\n```" in card


def test_verify_accepts_the_merge_and_finds_a_flipped_byte(workplace, merges, tmp_path):
    import shutil
    import subprocess
    import sys

    copy = tmp_path / "copy"
    shutil.copytree(merges / "merge=linear", copy)
    verify = [sys.executable, "-m", "fusion.merging.verify", str(copy)]
    assert subprocess.run(verify, capture_output=True).returncode == 0
    weights = copy / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert subprocess.run(verify, capture_output=True).returncode == 2


def test_finished_jobs_are_not_run_again(workplace, merges):
    before = {folder: (folder / "result.json").stat().st_mtime_ns for folder in job_folders(merges)}
    output = workplace.run(
        "merge", "-m", f"merge={','.join(METHODS)}", "merge.scale=search", "hydra.sweep.dir=runs/merges"
    )
    assert output.count("finished before") == len(METHODS)
    assert {folder: (folder / "result.json").stat().st_mtime_ns for folder in job_folders(merges)} == before


def test_the_same_settings_give_the_same_bytes(workplace, targets):
    workplace.run("train", "world=smoke", "source=tiny_b", "hydra.run.dir=again/tiny_b")
    first, second = targets / "source=tiny_b" / "model", workplace.root / "again" / "tiny_b" / "model"
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
