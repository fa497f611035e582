"""The evaluation itself: every scorer on every model, one model in memory at a time."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fusion.config import UserError
from fusion.config.evaluate import JUDGED, EvaluateConfig
from fusion.config.evaluation import AlpacaEvalConfig
from fusion.evaluation.alpaca_eval import AlpacaEval
from fusion.evaluation.answers import Generator, make_generator
from fusion.evaluation.benchmark_files import alpaca_eval_instructions, gamed_annotations, mt_bench_questions
from fusion.evaluation.candidate import Candidate
from fusion.evaluation.compare import read_test_and_heldout
from fusion.evaluation.dialogue_scorers import Heldout, Readings, Skills
from fusion.evaluation.endpoint import Endpoint
from fusion.evaluation.entries import Entry, Repetition
from fusion.evaluation.judge_prompts import alpaca_eval_prompt, mt_bench_prompts
from fusion.evaluation.length_control import Gamed, read_gamed
from fusion.evaluation.mt_bench import MTBench
from fusion.evaluation.sheet import Scorer, ScoreSheet, merged_sheets

Told = Callable[[str], None]


@dataclass
class Workshop:
    """Makes scorers; what several models share (questions, the judge, dialogues) is read once."""

    config: EvaluateConfig
    judge: Endpoint | None
    _readings: dict[str, Readings] = field(default_factory=dict)

    @classmethod
    def of(cls, config: EvaluateConfig) -> "Workshop":
        """Raises UserError before any model is loaded where questions, prompts or the judge cannot be had."""
        judge = Endpoint(config.judge, Path(config.paths.cache)) if set(JUDGED) & set(config.scorers) else None
        shop = cls(config, judge)
        if "mt_bench" in config.scorers:
            mt_bench_questions(config.mt_bench), mt_bench_prompts(config.mt_bench.prompts)
        if "alpaca_eval" in config.scorers:
            alpaca_eval_instructions(config.alpaca_eval), alpaca_eval_prompt(config.alpaca_eval.prompts)
            _gamed(config.alpaca_eval)
        if "lm_eval" in config.scorers:
            from fusion.evaluation.harness import require_harness

            require_harness(config.lm_eval)
        return shop

    def scorers(self, repetition: Repetition) -> dict[str, Scorer]:
        """The wanted scorers by name, for one repetition of a model."""
        makers: Mapping[str, Callable[[Repetition], Scorer]] = {
            "skills": lambda one: Skills(self.readings(one), one.seeds[0]),
            "heldout": lambda one: Heldout(self.readings(one), one.seeds[0]),
            "mt_bench": self._mt_bench,
            "alpaca_eval": self._alpaca_eval,
            "lm_eval": self._lm_eval,
        }
        return {name: makers[name](repetition) for name in dict.fromkeys(self.config.scorers)}

    def readings(self, repetition: Repetition) -> Readings:
        key = repr(repetition.data)
        if key not in self._readings:
            test, heldout = read_test_and_heldout(repetition.data)
            cache = Path(self.config.paths.cache)
            self._readings[key] = Readings(test, heldout, self.config.batch_tokens, cache)
        return self._readings[key]

    def _generator(self) -> Generator:
        return make_generator(self.config.generation, Path(self.config.paths.cache))

    def _mt_bench(self, repetition: Repetition) -> MTBench:
        assert self.judge is not None
        settings = self.config.mt_bench
        questions, prompts = mt_bench_questions(settings), mt_bench_prompts(settings.prompts)
        return MTBench(questions, prompts, self._generator(), self.judge, repetition.seeds)

    def _alpaca_eval(self, repetition: Repetition) -> AlpacaEval:
        assert self.judge is not None
        settings = self.config.alpaca_eval
        return AlpacaEval(
            alpaca_eval_instructions(settings),
            alpaca_eval_prompt(settings.prompts),
            _gamed(settings),
            self._generator(),
            self.judge,
            settings.both_orders,
            settings.temperature,
            repetition.seeds,
        )

    def _lm_eval(self, repetition: Repetition) -> Scorer:
        from fusion.evaluation.harness import Harness

        return Harness(self.config.lm_eval, repetition.seeds[0])


def _gamed(settings: AlpacaEvalConfig) -> Gamed | None:
    path = gamed_annotations(settings)
    return read_gamed(path) if path else None


def evaluate(config: EvaluateConfig, entries: Sequence[Entry], shop: Workshop, told: Told) -> list[list[ScoreSheet]]:
    """Sheets by scorer, in each the entries in order; a scorer that has no items of a model leaves it out."""
    found: dict[str, list[ScoreSheet]] = {name: [] for name in dict.fromkeys(config.scorers)}
    pivot = entries[0].repetitions[0].model
    for entry in entries:
        sheets: dict[str, list[ScoreSheet]] = {name: [] for name in found}
        for repetition in entry.repetitions:
            length = repetition.data.max_length
            candidate = Candidate.of_folder(repetition.model, pivot, length)
            for name, scorer in shop.scorers(repetition).items():
                sheets[name].append(scorer.score(candidate))
                told(f"{entry.name}: {name} done, seeds {', '.join(map(str, repetition.seeds))}")
            candidate.release()
        for name, repeated in sheets.items():
            found[name].append(merged_sheets(repeated))
    complete = [[sheet for sheet in sheets if sheet.items] for sheets in found.values()]
    if not any(complete):
        raise UserError("no scorer has anything to score: data.test_path and data.heldout_path name dialogues")
    return [sheets for sheets in complete if sheets]
