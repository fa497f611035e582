"""AlpacaEval 2: how probably a judge prefers a model's answer to the baseline's, and the same at equal lengths.

The judge names the better answer with one letter; its log-probabilities give the preference without drawing the letter
(https://arxiv.org/abs/2404.04475). A judge without log-probabilities gives drawn verdicts, and the report says so.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fusion.evaluation.answers import Answer, Generator, Prompt, answer_lines
from fusion.evaluation.benchmark_files import Instruction
from fusion.evaluation.candidate import Candidate
from fusion.evaluation.endpoint import Endpoint, Question, Reply
from fusion.evaluation.judge_prompts import PromptFile
from fusion.evaluation.length_control import FEWEST_ITEMS, Gamed, LengthControlled, length_controlled
from fusion.evaluation.mt_bench import comparability
from fusion.evaluation.sampling import Draw
from fusion.evaluation.sheet import ScoredItem, ScoreSheet

NUM_INSTRUCTIONS = 805
FIRST, SECOND = "m", "M"
"""The letters of the answer shown first and second."""
LETTER = re.compile(rf"\W*({FIRST}|{SECOND})\b")
"""A word of its own: "Model" names neither answer."""
TOP_LOGPROBS = 5
PUBLISHED_JUDGES = ("gpt-4-1106-preview", "gpt-4-turbo")


@dataclass(frozen=True)
class AlpacaEval:
    """Win rates of one model against the baseline; `seeds` repeat the generation."""

    instructions: Sequence[Instruction]
    prompts: PromptFile
    gamed: Gamed | None
    generator: Generator
    judge: Endpoint
    both_orders: bool = True
    temperature: float = 0.7
    seeds: Sequence[int] = (0,)
    name: str = "alpaca_eval"

    def score(self, candidate: Candidate) -> ScoreSheet:
        """A preference per instruction; the mean is the weighted win rate. Raises what generator and judge raise."""
        prompts = [Prompt(str(one.index), (one.text,), self.temperature) for one in self.instructions]
        items, judgments, lines, controlled = [], [], [], {}
        for seed in self.seeds:
            answers = self.generator.answers(candidate, prompts, seed)
            found = self._judged(candidate.name, answers, seed)
            preferences = self._preferences(found)
            judgments += found
            lines += answer_lines(candidate.name, self.name, seed, prompts, answers)
            controlled[seed] = self._controlled(answers, preferences, seed)
            items += [
                ScoredItem(str(one.index), one.category, seed, preference)
                for one, preference in zip(self.instructions, preferences, strict=True)
            ]
        return ScoreSheet(
            self.name,
            candidate.name,
            tuple(items),
            "% preferred",
            100.0,
            notes=self._notes(candidate.name, judgments, controlled),
            facts=self._facts(judgments, controlled),
            records={"answers": lines, "judgments": judgments},
        )

    def _judged(self, model: str, answers: Sequence[Answer], seed: int) -> list[dict[str, Any]]:
        shown = [
            (one, answer.turns[0], model_is_second)
            for one, answer in zip(self.instructions, answers, strict=True)
            for model_is_second in self._orders(one, seed)
        ]
        replies = self.judge.ask_all([self._question(*one) for one in shown])
        return [
            {
                "question_id": one.index,
                "model": model,
                "seed": seed,
                "judge": self.judge.settings.model,
                "shown": "second" if model_is_second else "first",
                "judgment": reply.text,
                "log_probabilities": reply.first_token,
                "preference": preference(reply, model_is_second),
            }
            for (one, _, model_is_second), reply in zip(shown, replies, strict=True)
        ]

    def _orders(self, one: Instruction, seed: int) -> tuple[bool, ...]:
        """Whether the model's answer is shown second: both, or one drawn by seed and instruction."""
        return (True, False) if self.both_orders else (Draw.named(0, "order", seed, one.index).seed % 2 == 0,)

    def _question(self, one: Instruction, answer: str, model_is_second: bool) -> Question:
        outputs = (one.baseline, answer) if model_is_second else (answer, one.baseline)
        messages = self.prompts.prompts["pair"].filled(instruction=one.text, output_1=outputs[0], output_2=outputs[1])
        return Question(messages, temperature=1.0, max_tokens=1, top_logprobs=TOP_LOGPROBS)

    def _preferences(self, judgments: Sequence[Mapping[str, Any]]) -> list[float | None]:
        """Mean over the orders; None where one of them cannot be read, for a single order is not fair."""
        by_item: dict[int, list[float | None]] = {}
        for line in judgments:
            by_item.setdefault(line["question_id"], []).append(line["preference"])
        return [mean_or_none(by_item[one.index]) for one in self.instructions]

    def _controlled(
        self, answers: Sequence[Answer], preferences: Sequence[float | None], seed: int
    ) -> LengthControlled | None:
        """None with too few preferences for a regression."""
        known_I = np.array([math.nan if one is None else one for one in preferences])
        if (~np.isnan(known_I)).sum() < FEWEST_ITEMS:
            return None
        lengths_I = np.array([len(one.turns[0]) for one in answers])
        baseline_I = np.array([len(one.baseline) for one in self.instructions])
        indices_I = [one.index for one in self.instructions]
        return length_controlled(known_I, lengths_I, baseline_I, indices_I, self.gamed, seed)

    def _facts(
        self, judgments: Sequence[Mapping[str, Any]], controlled: Mapping[int, LengthControlled | None]
    ) -> dict[str, Any]:
        return {
            "judge": self.judge.settings.model,
            "answered_as": sorted(self.judge.ledger.models),
            **self.prompts.to_json(),
            "baseline": sorted({one.generator for one in self.instructions}),
            "instructions": len(self.instructions),
            "both_orders": self.both_orders,
            "verdicts": len(judgments),
            "unreadable": sum(line["preference"] is None for line in judgments),
            "drawn": sum(_is_drawn(line) for line in judgments),
            "length_controlled": {str(seed): asdict(one) if one else None for seed, one in controlled.items()},
        }

    def _notes(
        self,
        model: str,
        judgments: Sequence[Mapping[str, Any]],
        controlled: Mapping[int, LengthControlled | None],
    ) -> tuple[str, ...]:
        notes = [self._comparability()]
        drawn, unreadable = (sum(map(test, judgments)) for test in (_is_drawn, _is_unreadable))
        if drawn:
            notes.append(
                f"Drawn verdicts: the judge gave no log-probabilities for {drawn} of {len(judgments)} verdicts, so "
                "each counts as a whole win or loss."
            )
        if unreadable:
            notes.append(f"{model}: {unreadable} of {len(judgments)} verdicts cannot be read; they are left out.")
        for seed, one in controlled.items():
            if one is not None:
                low, high = (f"{100 * end:.2f}" for end in one.interval)
                how = "" if one.is_published else " (by lengths alone, which is not the published regression)"
                notes.append(
                    f"{model}: length-controlled win rate {100 * one.win_rate:.2f}% [{low}, {high}], seed {seed}{how}."
                )
        return tuple(notes)

    def _comparability(self) -> str:
        missing = []
        if len(self.instructions) != NUM_INSTRUCTIONS:
            missing.append(f"{len(self.instructions)} of {NUM_INSTRUCTIONS} instructions")
        if self.gamed is None:
            missing.append("length control lacks the published difficulties and gamed baselines")
        return comparability(self.judge.settings.model, PUBLISHED_JUDGES, self.prompts, missing)


def preference(reply: Reply, model_is_second: bool) -> float | None:
    """How probably the judge prefers the model: from log-probabilities, else 0 or 1 by the letter it wrote.

    A letter that is not among the candidates counts as the least probable of them. None where neither letter is there.
    """
    own, other = (SECOND, FIRST) if model_is_second else (FIRST, SECOND)
    if reply.first_token is None:
        letter = LETTER.match(reply.text)
        return float(letter.group(1) == own) if letter else None
    letters: dict[str, float] = {}
    for token, logprob in reply.first_token.items():
        letters[token.strip()] = float(np.logaddexp(letters.get(token.strip(), -math.inf), logprob))
    if own not in letters and other not in letters:
        return None
    least = min(reply.first_token.values())
    return 1 / (1 + math.exp(letters.get(other, least) - letters.get(own, least)))


def mean_or_none(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def _is_drawn(line: Mapping[str, Any]) -> bool:
    return line["log_probabilities"] is None and line["preference"] is not None


def _is_unreadable(line: Mapping[str, Any]) -> bool:
    return line["preference"] is None
