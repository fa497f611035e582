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


def aligned(one_one: int = 750, inner: int = 200, covered: float = 0.8, **changes) -> dict:
    """The report of one source on 1000 tokens; 50 of them are n-1."""
    kinds = {"1-1": (one_one, 1.0, 0.9), "n-1": (50, 1.0, 0.4), "inner": (inner, 0.0, None)}
    names = ("rows", "covered", "mass_kept")
    parts = {
        kind: dict(zip(names, part, strict=True), share=part[0] / 1000) for kind, part in kinds.items() if part[0]
    }
    letters = {"rows": 900, "share": 0.9, "covered": 0.75, "mass_kept": 0.8, "kinds": {"1-1": 675, "inner": 225}}
    digits = {"rows": 100, "share": 0.1, "covered": 1.0, "mass_kept": 1.0, "kinds": {"1-1": 100}}
    return {
        "supervised_rows": 1000,
        "covered": covered,
        "aligned": covered,
        "mass_kept": 0.85,
        "kinds": parts,
        "categories": {"letters": letters, "digits": digits},
        "dtw": {"dialogues": 50, "rows": 90, "byte_rows": 80, "another_row": 0.025, "no_row": 0.1, "unread_row": None},
        "bytes_per_row": {"teacher": 20.4, "aligned": 58.46},
        **changes,
    }


def report(sources: dict | None = None, **changes) -> dict:
    """What stage 1 reports of a target."""
    sources = sources or {"tiny_a": aligned()}
    return {
        "dialogues": {"train": 240, "heldout": 80, "dropped": {"too long": 2}},
        "alignment": sources,
        "who_won": {"pivot": 160, "tiny_a": 80},
        "rows_won": {"pivot": 0.6, "tiny_a": 0.4},
        "trained_on": 120,
        "supervised_rows": 1000,
        "fallback_share": 0.123,
        **changes,
    }


def record_job(folder: Path, rows=(), **result) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = {"status": "finished", "comparison": [one.to_json() for one in rows], **result}
    (folder / "result.json").write_text(json.dumps(content))
