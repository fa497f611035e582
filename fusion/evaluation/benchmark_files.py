"""Questions of MT-Bench and AlpacaEval 2 from the hub or from files in the benchmarks' own formats."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusion.config import UserError, raise_problems
from fusion.config.evaluation import AlpacaEvalConfig, MTBenchConfig

BASELINE_FILE, GAMED_FILE = "alpaca_eval_gpt4_baseline.json", "df_gamed.csv"


@dataclass(frozen=True)
class TwoTurns:
    """A question of MT-Bench."""

    name: str
    category: str
    turns: tuple[str, str]
    references: tuple[str, ...]
    """Reference answers of both turns; empty where there are none."""


@dataclass(frozen=True)
class Instruction:
    """A question of AlpacaEval with the baseline's answer."""

    index: int
    """Its place in the file, by which difficulties are found."""
    text: str
    baseline: str
    generator: str
    """Who wrote the baseline's answer."""
    category: str


def mt_bench_questions(settings: MTBenchConfig) -> list[TwoTurns]:
    """Raises UserError with every bad row of the questions and the references."""
    local = Path(settings.questions)
    rows = _json_lines(local, "mt_bench.questions") if local.suffix else _hub_rows(settings.questions)
    references = _references(settings.references) if settings.references else {}
    questions, problems = [], []
    for number, row in enumerate(rows, start=1):
        found = _two_turns(row, references)
        if isinstance(found, str):
            problems.append(f"{settings.questions}, row {number}: {found}")
        else:
            questions.append(found)
    if len({one.name for one in questions}) < len(questions):
        problems.append(f"{settings.questions}: two questions have the same question_id")
    if not questions and not problems:
        problems.append(f"{settings.questions}: there are no questions in it")
    raise_problems(problems)
    return questions[: settings.limit]


def _two_turns(row: object, references: Mapping[str, tuple[str, ...]]) -> TwoTurns | str:
    if not isinstance(row, Mapping):
        return "an object with question_id, category and turns is expected"
    name = str(row.get("question_id", row.get("prompt_id", "")))
    turns = row.get("turns", row.get("prompt"))
    if not name or not isinstance(turns, list) or len(turns) != 2 or not all(isinstance(one, str) for one in turns):
        return "question_id and two turns are expected"
    own = row.get("reference") or []
    given = references.get(name) or tuple(map(str, own if isinstance(own, list) else []))
    return TwoTurns(name, str(row.get("category", "")), (turns[0], turns[1]), given)


def _references(path: str) -> dict[str, tuple[str, ...]]:
    found, problems = {}, []
    for number, row in enumerate(_json_lines(Path(path), "mt_bench.references"), start=1):
        try:
            found[str(row["question_id"])] = tuple(map(str, row["choices"][0]["turns"]))
        except (KeyError, IndexError, TypeError) as error:
            problems.append(f"{path}, row {number}: not a reference answer of FastChat's format ({error!r})")
    raise_problems(problems)
    return found


def alpaca_eval_instructions(settings: AlpacaEvalConfig) -> list[Instruction]:
    """Raises UserError with every bad row."""
    path = _file_or_hub(settings.questions, BASELINE_FILE, "alpaca_eval.questions")
    try:
        rows = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"alpaca_eval.questions={settings.questions}: no JSON list can be read: {error}") from error
    if not isinstance(rows, list):
        raise UserError(f"{path.name}: a JSON list of objects with `instruction` and `output` is expected")
    fields = ("instruction", "output")
    problems = [
        f"{path.name}, row {number}: texts `instruction` and `output` are expected"
        for number, row in enumerate(rows, start=1)
        if not isinstance(row, Mapping) or not all(isinstance(row.get(field), str) for field in fields)
    ]
    raise_problems(problems or ([] if rows else [f"{path.name}: there are no questions in it"]))
    return [
        Instruction(
            index, row["instruction"], row["output"], str(row.get("generator", "")), str(row.get("dataset", ""))
        )
        for index, row in enumerate(rows)
    ][: settings.limit]


def gamed_annotations(settings: AlpacaEvalConfig) -> Path | None:
    """`df_gamed.csv` of the published length control; None where the settings ask for none."""
    return _file_or_hub(settings.gamed, GAMED_FILE, "alpaca_eval.gamed") if settings.gamed else None


def _file_or_hub(place: str, file: str, setting: str) -> Path:
    """A local file, or `file` of a dataset of the hub: the raw file, no dataset script."""
    if Path(place).suffix or Path(place).is_file():
        return Path(place)
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(place, file, repo_type="dataset"))
    except Exception as error:  # offline, gated, moved: many kinds, one remedy
        raise UserError(
            f"{setting}={place}: {file} cannot be had from the hub ({_first_line(error)}); give the path of a copy"
        ) from error


def _hub_rows(name: str) -> Iterable[Mapping[str, Any]]:
    import datasets

    try:
        return datasets.load_dataset(name, split="train")
    except Exception as error:  # as above
        raise UserError(
            f"mt_bench.questions={name}: the questions cannot be had from the hub ({_first_line(error)}); "
            "give the path of FastChat's question.jsonl"
        ) from error


def _json_lines(path: Path, setting: str) -> list[Any]:
    try:
        lines = path.read_text("utf-8").split("\n")
        return [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{setting}={path}: no JSON lines can be read: {error}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
