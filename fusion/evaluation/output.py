"""What an evaluation leaves: tables, scores, items, answers and verdicts, and a page with answers side by side."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fusion.cache import write_json, write_text
from fusion.evaluation.sheet import ScoreSheet, item_rows
from fusion.evaluation.significance import contrasts, markdown
from fusion.tracking.page import render

TABLES = "evaluation.md"
PAGE = "answers.html.j2"


def write_evaluation(folder: Path, scorers: Sequence[Sequence[ScoreSheet]], which: str = "all") -> list[Path]:
    """Write `evaluation.md`, `scores.json`, `items.jsonl`, the records of every model, and `answers.html`.

    `which` pairs of models are compared: a name of `significance.PAIRS`.

    Returns the paths to show: tables, and the page where there are answers.
    """
    sheets = [sheet for group in scorers for sheet in group]
    pairs = [contrasts(group, which) for group in scorers]
    tables = (markdown(group, found) for group, found in zip(scorers, pairs, strict=True))
    write_text(folder / TABLES, "\n".join(["# Evaluation\n", *tables]))
    write_json(
        folder / "scores.json",
        {
            group[0].scorer: {
                "models": [sheet.to_json() for sheet in group],
                "pairs": [one.to_json() for one in found],
            }
            for group, found in zip(scorers, pairs, strict=True)
        },
    )
    _write_lines(folder / "items.jsonl", item_rows(sheets))
    for model in dict.fromkeys(sheet.model for sheet in sheets):
        for name, lines in _records(sheet for sheet in sheets if sheet.model == model).items():
            _write_lines(folder / _file_name(model) / f"{name}.jsonl", lines)
    questions = _side_by_side(sheets)
    if not questions:
        return [folder / TABLES]
    write_text(folder / "answers.html", render(PAGE, Path(__file__).parent, questions=questions))
    return [folder / TABLES, folder / "answers.html"]


def _records(sheets: Iterable[ScoreSheet]) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for sheet in sheets:
        for name, lines in sheet.records.items():
            found.setdefault(name, []).extend(lines)
    return found


def _write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(line, ensure_ascii=False, sort_keys=True) + "\n" for line in lines))


def _file_name(model: str) -> str:
    return re.sub(r"[^\w.=+-]+", "-", model).strip("-.") or "model"


def _side_by_side(sheets: Sequence[ScoreSheet]) -> list[dict[str, Any]]:
    """Every answered question with the answers and scores of all models, in order of first appearance."""
    questions: dict[tuple[str, str, int], dict[str, Any]] = {}
    for sheet in sheets:
        scores = {(one.item, one.seed): one for one in sheet.items}
        for line in sheet.records.get("answers", ()):
            name, seed = str(line["question_id"]), line["seed"]
            one = questions.setdefault(
                (sheet.scorer, name, seed),
                {
                    "scorer": sheet.scorer,
                    "name": name,
                    "seed": seed,
                    "turns": line.get("questions", []),
                    "answers": [],
                },
            )
            item = scores.get((name, seed))
            one["category"] = item.category if item else ""
            score = None if item is None or item.score is None else sheet.factor * item.score
            one["answers"].append({"model": sheet.model, "score": score, "turns": line["choices"][0]["turns"]})
    return list(questions.values())
