"""MT-Bench: 80 questions of two turns, every answer marked from 1 to 10 by a judge (https://arxiv.org/abs/2306.05685).

As in FastChat: the answer's temperature depends on the category, categories with right answers are judged beside a
reference, each turn is marked on its own. A question is one item of the statistics, because its two marks are not
independent.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from fusion.evaluation.answers import Answer, Generator, Prompt, answer_lines
from fusion.evaluation.benchmark_files import TwoTurns
from fusion.evaluation.candidate import Candidate
from fusion.evaluation.endpoint import Endpoint, Question, Reply
from fusion.evaluation.judge_prompts import PromptFile
from fusion.evaluation.sheet import ScoredItem, ScoreSheet

NUM_QUESTIONS = 80
WITH_REFERENCE = ("math", "reasoning", "coding")
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1} | dict.fromkeys(
    ("extraction", "math", "coding", "reasoning"), 0.0
)
OTHER_TEMPERATURE = 0.7
VERDICT_TOKENS = 2048
MARKS = (re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]"))
PUBLISHED_JUDGES = ("gpt-4", "gpt-4-0613", "gpt-4-0125-preview")


@dataclass(frozen=True)
class MTBench:
    """Marks of one model; `seeds` repeat the generation."""

    questions: Sequence[TwoTurns]
    prompts: PromptFile
    generator: Generator
    judge: Endpoint
    seeds: Sequence[int] = (0,)
    name: str = "mt_bench"

    def score(self, candidate: Candidate) -> ScoreSheet:
        """Marks of all verdicts that can be read; the others are counted. Raises what generator and judge raise."""
        prompts = [
            Prompt(one.name, one.turns, TEMPERATURES.get(one.category, OTHER_TEMPERATURE)) for one in self.questions
        ]
        answers = {seed: self.generator.answers(candidate, prompts, seed) for seed in self.seeds}
        verdicts = [line for seed in self.seeds for line in self._judged(candidate.name, answers[seed], seed)]
        by_item: dict[tuple[int, str], list[float | None]] = {}
        for line in verdicts:
            by_item.setdefault((line["seed"], str(line["question_id"])), []).append(line["score"])
        categories = {one.name: one.category for one in self.questions}
        items = tuple(_item(name, categories[name], seed, marks) for (seed, name), marks in by_item.items())
        lines = [
            line
            for seed in self.seeds
            for line in answer_lines(candidate.name, self.name, seed, prompts, answers[seed])
        ]
        return ScoreSheet(
            self.name,
            candidate.name,
            items,
            "mark of 10",
            notes=self._notes(verdicts),
            facts=self._facts(verdicts),
            records={"answers": lines, "judgments": verdicts},
        )

    def _judged(self, model: str, answers: Sequence[Answer], seed: int) -> list[dict[str, Any]]:
        """A verdict per answer and turn, in FastChat's format."""
        shown = [
            (question, turn, *self._shown(question, answer, turn))
            for question, answer in zip(self.questions, answers, strict=True)
            for turn in (1, 2)
        ]
        replies = self.judge.ask_all([question for *_, question in shown])
        return [
            {
                "question_id": one.name,
                "model": model,
                "seed": seed,
                "turn": turn,
                "judge": [self.judge.settings.model, prompt],
                "judgment": reply.text,
                "score": mark(reply),
            }
            for (one, turn, prompt, _), reply in zip(shown, replies, strict=True)
        ]

    def _shown(self, question: TwoTurns, answer: Answer, turn: int) -> tuple[str, Question]:
        """Name of the prompt, and what the judge is asked."""
        with_reference = question.category in WITH_REFERENCE and len(question.references) >= turn
        name = f"single{'-math' if with_reference else ''}-v1{'-multi-turn' if turn == 2 else ''}"
        fields = {f"ref_answer_{number}": text for number, text in enumerate(question.references, start=1)}
        fields |= {"question": question.turns[0], "answer": answer.turns[0]}
        for number in (1, 2):
            fields |= {f"question_{number}": question.turns[number - 1], f"answer_{number}": answer.turns[number - 1]}
        messages = self.prompts.prompts[name].filled(**fields)
        return name, Question(messages, temperature=0.0, max_tokens=VERDICT_TOKENS)

    def _facts(self, verdicts: Sequence[dict[str, Any]]) -> dict[str, Any]:
        by_turn = {turn: [one["score"] for one in verdicts if one["turn"] == turn] for turn in (1, 2)}
        read = {turn: [one for one in marks if one is not None] for turn, marks in by_turn.items()}
        settings = self.judge.settings
        return {
            "judge": settings.model,
            "answered_as": sorted(self.judge.ledger.models),
            **self.prompts.to_json(),
            "questions": len(self.questions),
            "turns": {f"turn_{turn}": fmean(marks) if marks else None for turn, marks in read.items()},
            "verdicts": len(verdicts),
            "unreadable": len(verdicts) - sum(map(len, read.values())),
        }

    def _notes(self, verdicts: Sequence[dict[str, Any]]) -> tuple[str, ...]:
        notes = [comparability(self.judge.settings.model, PUBLISHED_JUDGES, self.prompts, self._missing())]
        unreadable = sum(one["score"] is None for one in verdicts)
        if unreadable:
            model = verdicts[0]["model"]
            notes.append(f"{model}: {unreadable} of {len(verdicts)} verdicts cannot be read; they are left out.")
        return tuple(notes)

    def _missing(self) -> list[str]:
        lacking = sum(one.category in WITH_REFERENCE and len(one.references) < 2 for one in self.questions)
        return [
            *([f"{len(self.questions)} of {NUM_QUESTIONS} questions"] if len(self.questions) != NUM_QUESTIONS else []),
            *([f"{lacking} questions lack their reference answers"] if lacking else []),
        ]


def mark(reply: Reply) -> float | None:
    """The mark in double brackets, else in single ones; None where there is none from 1 to 10."""
    found = next((match for pattern in MARKS if (match := pattern.search(reply.text))), None)
    value = float(found.group(1)) if found else 0.0
    return value if 1 <= value <= 10 else None


def comparability(judge: str, published: Sequence[str], prompts: PromptFile, missing: Sequence[str]) -> str:
    """One sentence: with which published numbers these can be compared."""
    reasons = [*([f"the judge is {judge}"] if judge not in published else [])]
    reasons += ["the prompts are the built-in ones"] if prompts.is_built_in else []
    reasons += missing
    if reasons:
        return f"Not comparable with published numbers: {'; '.join(reasons)}."
    return (
        f"Comparable only with numbers of the same judge ({judge}) and the same prompts ({prompts.origin}, "
        f"sha256 {prompts.digest})."
    )


def _item(name: str, category: str, seed: int, marks: Sequence[float | None]) -> ScoredItem:
    """A question: the mean of its marks, weighing as many as can be read."""
    read = [one for one in marks if one is not None]
    return ScoredItem(name, category, seed, fmean(read) if read else None, float(len(read) or 1))
