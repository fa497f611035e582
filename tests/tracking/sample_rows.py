"""A small sweep, as its jobs record it."""

import json
from pathlib import Path

from fusion.tracking.rows import ComparisonRow

SKILLS = ("facts", "followup", "add", "units", "translate", "order")


def row(model: str, kind: str, score: float | None, *, seed: int = 1, **extra) -> ComparisonRow:
    """A model that has the same score in every skill, on 100 questions each."""
    defaults = {
        "strategy": model if kind == "merged" else "",
        "path": f"runs/{kind}/{model}/{seed}",
        "scores": dict.fromkeys((*SKILLS, "average"), score),
        "nll_per_byte": 0.5,
        "num_items": dict.fromkeys(SKILLS, 100),
        "command": f"python merge.py merge={model} seed={seed}",
    }
    return ComparisonRow(model=model, kind=kind, seed=seed, **{**defaults, **extra})


def baselines(seed: int = 1) -> list[ComparisonRow]:
    return [
        row("tiny_b", "target", 0.581, seed=seed, strong_skills=("add", "units")),
        row("tiny_a", "target", 0.560, seed=seed, strong_skills=("facts", "followup")),
        row("sft", "sft", 0.553, seed=seed),
        row("tiny_b", "source", 0.35, seed=seed, strong_skills=("add", "units")),
        row("tiny_a", "source", 0.38, seed=seed, strong_skills=("facts", "followup")),
        row("pivot", "pivot", 0.407, seed=seed),
    ]


def sweep() -> list[ComparisonRow]:
    coefficients = {"tiny_a": 0.9, "tiny_b": -0.3}
    return [
        row("linear", "merged", 0.6),
        row(
            "sce", "merged", 0.712, scale=1.8, scale_searched=True, coefficients=coefficients, parameters={"tau": 0.1}
        ),
        *baselines(),
    ]


def record_job(folder: Path, rows=(), **result) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = {"status": "finished", "comparison": [one.to_json() for one in rows], **result}
    (folder / "result.json").write_text(json.dumps(content))
