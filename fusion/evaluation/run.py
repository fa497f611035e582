"""The evaluation itself: every scorer on every model, one model in memory at a time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from fusion.config import UserError, raise_problems
from fusion.config.evaluate import JUDGED, EvaluateConfig
from fusion.config.evaluation import AlpacaEvalConfig
from fusion.evaluation.alpaca_eval import AlpacaEval
from fusion.evaluation.answers import Generator, make_generator, server_problems
from fusion.evaluation.benchmark_files import alpaca_eval_instructions, gamed_annotations, mt_bench_questions
from fusion.evaluation.candidate import Candidate
from fusion.evaluation.compare import read_test_and_heldout
from fusion.evaluation.dialogue_scorers import Heldout, Readings, Skills
from fusion.evaluation.endpoint import Endpoint, endpoint_problems
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
        """Raises UserError before any model is loaded, with everything that the scorers cannot read or use."""
        raise_problems([problem for need in _needs(config) for problem in _problems_of(need)])
        is_judged = bool(set(JUDGED) & set(config.scorers))
        return cls(config, Endpoint(config.judge, Path(config.paths.cache)) if is_judged else None)

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


def _needs(config: EvaluateConfig) -> Iterator[Callable[[], object]]:
    """What the wanted scorers read before they begin; each raises UserError by itself."""
    wanted, mt_bench, alpaca_eval = set(config.scorers), config.mt_bench, config.alpaca_eval
    if wanted & set(JUDGED):
        yield lambda: raise_problems(endpoint_problems(config.judge, "judge"))
        if config.generation.base_url:
            yield lambda: raise_problems(server_problems(config.generation))
    if "mt_bench" in wanted:
        yield lambda: mt_bench_questions(mt_bench)
        yield lambda: mt_bench_prompts(mt_bench.prompts)
    if "alpaca_eval" in wanted:
        yield lambda: alpaca_eval_instructions(alpaca_eval)
        yield lambda: alpaca_eval_prompt(alpaca_eval.prompts)
        yield lambda: _gamed(alpaca_eval)
    if "lm_eval" in wanted:
        from fusion.evaluation.harness import require_harness

        yield lambda: require_harness(config.lm_eval)


def _problems_of(need: Callable[[], object]) -> list[str]:
    try:
        need()
    except UserError as error:
        return error.problems
    return []


def _gamed(settings: AlpacaEvalConfig) -> Gamed | None:
    path = gamed_annotations(settings)
    return read_gamed(path) if path else None


def require_readable(entries: Sequence[Entry]) -> None:
    """Raises UserError with every model whose tokeniser or template cannot be used, before hours go into the first."""
    pivot = entries[0].repetitions[0].model
    models = dict.fromkeys(one.model for entry in entries for one in entry.repetitions)
    found = [problem for model in models for problem in _problems_of(partial(Candidate.of_folder, model, pivot))]
    raise_problems(list(dict.fromkeys(found)))


def evaluate(config: EvaluateConfig, entries: Sequence[Entry], shop: Workshop, told: Told) -> list[list[ScoreSheet]]:
    """Sheets by scorer, in each the entries in order; a scorer that has no items of a model leaves it out."""
    found: dict[str, list[ScoreSheet]] = {name: [] for name in dict.fromkeys(config.scorers)}
    require_readable(entries)
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
