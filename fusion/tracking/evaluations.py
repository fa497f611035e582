"""What is known of a comparison's models beside their scores: answers side by side, and the paired tests of
`evaluate.py`."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusion.tracking.rows import AVERAGE, ComparisonRow

SAMPLES, THESE_RUNS = "sample", "the jobs themselves"
SCORES_FILE, ITEMS_FILE, ANSWERS_FILE = "scores.json", "items.jsonl", "answers.jsonl"
MOST_PAIRS, MOST_QUESTIONS, MOST_MODELS, MOST_MERGES, MOST_CHARACTERS = 300, 60, 12, 5, 3000


@dataclass(frozen=True)
class PairedTest:
    """The first model's score less the second's, in the unit of the scorer."""

    scorer: str
    first: str
    second: str
    difference: float
    low: float
    high: float
    p_value: float
    adjusted: float
    """After Holm's correction over all pairs of the scorer."""
    significant: bool
    more_is_better: bool

    @property
    def difference_text(self) -> str:
        return _signed(self.difference)

    @property
    def interval_text(self) -> str:
        return f"{_signed(self.low)} to {_signed(self.high)}"

    @property
    def p_text(self) -> str:
        return _p_text(self.p_value)

    @property
    def adjusted_text(self) -> str:
        return _p_text(self.adjusted)

    @property
    def verdict(self) -> str:
        if not self.significant:
            return "not shown"
        return "better" if (self.difference > 0) == self.more_is_better else "worse"


@dataclass(frozen=True)
class Question:
    """One question with the answers of the models to it."""

    name: str
    scorer: str
    category: str
    seed: int
    turns: tuple[str, ...]
    answers: tuple[Mapping[str, Any], ...]  # model, score (None: not scored), turns


@dataclass(frozen=True)
class Evaluation:
    """One folder of `evaluate.py`."""

    job: str
    command: str
    tests: tuple[PairedTest, ...] = ()
    questions: tuple[Question, ...] = ()
    num_tests: int = 0
    num_questions: int = 0
    """How many there are; the page has those that it can show."""
    models: tuple[str, ...] = field(default=())


def read_evaluation(job: str, folder: Path, command: str) -> Evaluation | None:
    """The evaluation in `folder`; None where it cannot be read."""
    try:
        scores = json.loads((folder / SCORES_FILE).read_text("utf-8"))
        tests = [_test(pair, _factor(group)) for group in scores.values() for pair in group["pairs"]]
        questions = _questions(folder, {name: _factor(group) for name, group in scores.items()})
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None
    tests = [test for test in tests if test.scorer]
    models = dict.fromkeys(model["model"] for group in scores.values() for model in group["models"])
    shown = sorted(tests, key=lambda test: test.adjusted)[:MOST_PAIRS] if len(tests) > MOST_PAIRS else tests
    return Evaluation(
        job, command, tuple(shown), tuple(questions[:MOST_QUESTIONS]), len(tests), len(questions), tuple(models)
    )


def sampled_answers(rows: Sequence[ComparisonRow]) -> Evaluation | None:
    """The answers that jobs wrote out with their scores; None where there are none. Leading merges come first."""
    order = {kind: place for place, kind in enumerate(("pivot", "merged", "target", "sft", "source"))}
    leading = sorted(rows, key=lambda row: (order[row.kind], -(row.scores.get(AVERAGE) or 0.0)))
    asked: dict[tuple[int | None, str, str, str], list[Mapping[str, Any]]] = {}
    merges: Counter[tuple[int | None, str, str, str]] = Counter()
    for row in leading:
        for sample in row.samples:
            question = (row.seed, sample["category"], sample["question"], sample["reference"])
            merges[question] += row.kind == "merged"
            if row.kind != "merged" or merges[question] <= MOST_MERGES:
                answer = _answer(f"{row.strategy or row.model} ({row.kind})", sample["answer"])
                asked.setdefault(question, []).append(answer)
    questions = [_sampled(number, *key, answers) for number, (key, answers) in enumerate(asked.items(), start=1)]
    models = dict.fromkeys(answer["model"] for answers in asked.values() for answer in answers)
    shown = tuple(questions[:MOST_QUESTIONS])
    return Evaluation(THESE_RUNS, "", (), shown, 0, len(questions), tuple(models)) if questions else None


def _sampled(
    number: int, seed: int | None, category: str, question: str, right: str, answers: Sequence[Mapping[str, Any]]
) -> Question:
    side_by_side = (_answer("the right answer", right), *answers[:MOST_MODELS])
    return Question(str(number), SAMPLES, category, seed or 0, (_cut(question),), side_by_side)


def _answer(model: str, text: str) -> Mapping[str, Any]:
    return {"model": model, "score": None, "turns": [_cut(text)]}


def _factor(group: Mapping[str, Any]) -> float:
    return float(group["models"][0]["factor"])


def _test(pair: Mapping[str, Any], factor: float) -> PairedTest:
    result = pair["result"]
    difference, low, high = (factor * value for value in (result["mean"], *result["interval"]))
    return PairedTest(
        pair["scorer"] if pair["category"] == AVERAGE else "",
        pair["first"],
        pair["second"],
        difference,
        low,
        high,
        result["p_value"],
        pair["adjusted"],
        bool(pair["significant"]),
        bool(pair["more_is_better"]),
    )


def _questions(folder: Path, factors: Mapping[str, float]) -> list[Question]:
    """In the order in which the models were asked; the answers of one question in the order of the models."""
    files = sorted(folder.glob(f"*/{ANSWERS_FILE}"))
    lines = [line for file in files for line in _lines(file)] if files else []
    items = {(row["scorer"], row["model"], row["item"], row["seed"]): row for row in _lines(folder / ITEMS_FILE)}
    asked: dict[tuple[str, str, int], list[Mapping[str, Any]]] = {}
    for line in lines:
        asked.setdefault((line["benchmark"], str(line["question_id"]), line["seed"]), []).append(line)
    return [_question(key, given, items, factors.get(key[0], 1.0)) for key, given in asked.items()]


def _question(
    key: tuple[str, str, int], lines: Sequence[Mapping[str, Any]], items: Mapping[Any, Any], factor: float
) -> Question:
    scorer, name, seed = key
    found = [items.get((scorer, line["model_id"], name, seed), {}) for line in lines[:MOST_MODELS]]
    answers = [
        {
            "model": line["model_id"],
            "score": None if item.get("score") is None else round(factor * item["score"], 3),
            "turns": [_cut(turn) for turn in line["choices"][0]["turns"]],
        }
        for line, item in zip(lines, found, strict=False)
    ]
    category = next((item["category"] for item in found if item), "")
    return Question(name, scorer, category, seed, tuple(map(_cut, lines[0].get("questions", []))), tuple(answers))


def _signed(value: float) -> str:
    """Two decimals, or four for numbers below 1 in size."""
    return f"{value:+.2f}" if abs(value) >= 1 else f"{value:+.4f}"


def _p_text(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _cut(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]} … ({len(text)} characters)"


def _lines(path: Path) -> Iterator[Mapping[str, Any]]:
    with path.open(encoding="utf-8") as file:
        yield from (json.loads(line) for line in file if line.strip())
