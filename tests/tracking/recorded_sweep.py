"""Whole sweeps as `train.py`, `merge.py` and `evaluate.py` record them, without any training: pages of any size."""

import csv
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from sample_rows import SKILLS, baselines, row

from fusion.config.launch import Job
from fusion.evaluation.output import write_evaluation
from fusion.evaluation.sheet import ScoredItem, ScoreSheet
from fusion.merging import merge_deltas
from fusion.tracking.record import RunRecord
from fusion.tracking.rows import ComparisonRow

TARGETS = ("tiny_a", "tiny_b")
TENSORS = (
    "model.embed_tokens.weight",
    *(f"model.layers.{n}.mlp.up_proj.weight" for n in range(4)),
    "model.norm.weight",
)
METHODS = ("sce", "task_arithmetic", "ties", "linear")
STEPS = 400
QUESTIONS = ("Name a river.", "Add 2 and 3 <b>now</b>.", "Say </script> twice.")


def record_sweep(folder: Path, num_merges: int, num_failures: int = 1) -> Path:
    """Targets in `folder/targets`, merges in `folder/merges`, an evaluation in `folder/evaluation`."""
    rng = random.Random(num_merges)
    for name in TARGETS:
        _record_target(folder / "targets" / f"source={name}", name, rng)
    reports = {method: _report(method) for method in METHODS}
    for number in range(num_merges):
        _record_merge(folder, number, reports, rng)
    for number in range(num_failures):
        _record_failure(folder / "merges" / f"broken{number}", f"out of memory at tensor {number}")
    _record_evaluation(folder / "evaluation")
    return folder


def _job(folder: Path, command: str) -> Job:
    return Job(folder, folder.name, command, "seed: 1\n", folder.parent)


def _record_target(folder: Path, name: str, rng: random.Random) -> None:
    scores = {skill: round(rng.uniform(0.3, 0.7), 3) for skill in SKILLS}
    scored = _row(
        name, "target", scores, folder, f"python train.py source={name}", parameters={"optim": {"lr": 0.001}}
    )
    (folder / "csv").mkdir(parents=True)
    with (folder / "csv" / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["step", "train/loss", "train/ce", "train/lr", "score/average"])
        writer.writeheader()
        for step in range(9, STEPS, 10):
            loss = 0.3 + 50 / (step + 20) + rng.uniform(0, 0.05)
            writer.writerow({"step": step, "train/loss": loss, "train/ce": 0.8 * loss, "train/lr": 1e-3})
        writer.writerow({"step": STEPS, "score/average": 0.5})
    with RunRecord(_job(folder, scored.command), "train", 1, name) as record:
        lineage = {
            "inputs": {"dialogues": "d" * 64, "pivot": "b" * 64, name: name[-1] * 64},
            "distributions": name * 2,
        }
        record.finish({"comparison": [one.to_json() for one in (*baselines()[3:], scored)]}, lineage)


def _record_merge(folder: Path, number: int, reports: dict, rng: random.Random) -> None:
    method, job = METHODS[number % len(METHODS)], folder / "merges" / f"{number:03}"
    settings = {"tau": rng.choice([0.1, 0.3, 1.0]), "off_diagonal": round(10 ** rng.uniform(-3, 0), 5)}
    settings |= {"renormalize": rng.random() < 0.5, "targets": {"alignment": {"name": rng.choice(["ms", "em"])}}}
    quality = 0.45 + 0.3 * settings["tau"] + 0.05 * number / (number + 20)
    scores = {skill: min(1.0, max(0.0, round(quality + rng.gauss(0, 0.06), 3))) for skill in SKILLS}
    command = f"python merge.py merge={method} merge.tau={settings['tau']} number={number}"
    more = {"strategy": method, "scale": 1.0 + number % 3 / 2, "parameters": settings}
    scored = _row(
        method, "merged", scores, job, command, coefficients=dict(zip(TARGETS, (0.6, 0.4), strict=True)), **more
    )
    lineage = {"inputs": _merge_inputs(), "stage1": {name: _stage1_lineage(name) for name in TARGETS}}
    with RunRecord(_job(job, command), "merge", 1, str(number)) as record:
        result = {"merge": reports[method], "targets": list(TARGETS), "comparison": [scored.to_json()]}
        record.finish(result, lineage)


def _stage1_lineage(name: str) -> dict:
    inputs = {"dialogues": "d" * 64, "pivot": "b" * 64, name: name[-1] * 64}
    return {"inputs": inputs, "distributions": f"of {name}"}


def _merge_inputs() -> dict:
    return {"targets": [[name, name[-1] * 32] for name in TARGETS], "base": "b" * 64}


def _record_failure(folder: Path, reason: str) -> None:
    try:
        with RunRecord(_job(folder, "python merge.py merge=karcher"), "merge", 1, "failed"):
            raise MemoryError(reason)
    except MemoryError:
        return


def _record_evaluation(folder: Path) -> None:
    sheets = [_sheet(f"merged {method}", place) for place, method in enumerate(METHODS[:3])]
    with RunRecord(_job(folder, "python evaluate.py runs=[merges]"), "evaluate", 1, "evaluation") as record:
        write_evaluation(folder, [sheets])
        record.finish({"scores": "scores.json", "items": "items.jsonl"}, {})


def _sheet(model: str, quality: int) -> ScoreSheet:
    rng = random.Random(model)
    names = [str(number) for number in range(40)]
    items = tuple(ScoredItem(name, "writing", 0, 3 * quality + rng.random()) for name in names)
    answers = [
        {
            "question_id": name,
            "model_id": model,
            "benchmark": "mt_bench",
            "seed": 0,
            "questions": [QUESTIONS[int(name)]],
            "choices": [{"index": 0, "turns": [f"{model} says </script><img src=x> {name}"]}],
        }
        for name in names[: len(QUESTIONS)]
    ]
    return ScoreSheet("mt_bench", model, items, records={"answers": answers})


def _row(model: str, kind: str, scores: dict, folder: Path, command: str, **extra) -> ComparisonRow:
    average = sum(scores.values()) / len(scores)
    scores = {**scores, "average": average}
    return row(model, kind, None, scores=scores, path=str(folder / "model"), command=command, **extra)


def _report(method: str) -> dict:
    """Of a real merge of small models, on whose layers the targets have different weights."""
    base, *targets = _states()
    return merge_deltas(method, base, targets).report.to_dict()


def _states() -> Iterator[dict[str, torch.Tensor]]:
    for seed in range(1 + len(TARGETS)):
        generator = torch.Generator().manual_seed(seed)
        yield {name: (1 + n) ** seed * torch.randn(6, 4, generator=generator) for n, name in enumerate(TENSORS)}
