"""Tasks of the EleutherAI harness on a live model, through its Python API.

https://github.com/EleutherAI/lm-evaluation-harness
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from fusion.config import UserError
from fusion.config.evaluation import LMEvalConfig
from fusion.evaluation.candidate import Candidate
from fusion.evaluation.sheet import ScoredItem, ScoreSheet

PREFERRED = ("exact_match", "acc_norm", "acc", "f1", "em")
"""The metric of a task that is shown, where it has several."""
OWN_SEED = 1234
"""The harness's own seed of everything but Python's `random`, whose seed is 0."""
REMEDY = "pip install 'fusion-chat[lm-eval]'"


def require_harness(settings: LMEvalConfig) -> None:
    """Raises UserError where the harness is not installed or lacks a task."""
    if find_spec("lm_eval") is None:
        raise UserError(f"scorers: lm_eval needs the EleutherAI harness; {REMEDY}")
    manager = _task_manager(settings)
    missing = [task for task in settings.tasks if not manager.match_tasks([task])]
    if missing or not settings.tasks:
        raise UserError(
            f"lm_eval.tasks: the harness has no task {', '.join(missing) or '(none is named)'}; "
            "`lm_eval ls tasks` lists them, lm_eval.include_path adds a folder of your own"
        )


@dataclass(frozen=True)
class Harness:
    """Scores per item; the average weighs every task alike. Seed 0 draws the examples that its command line draws."""

    settings: LMEvalConfig
    seed: int = 0
    name: str = "lm_eval"

    def score(self, candidate: Candidate) -> ScoreSheet:
        """Raises UserError where a task's metric has no value per item."""
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        tokenizer = candidate.reader.tokenizer
        model = HFLM(pretrained=candidate.module(), tokenizer=tokenizer, batch_size=self.settings.batch_size)
        found = lm_eval.simple_evaluate(
            model=model,
            tasks=list(self.settings.tasks),
            num_fewshot=self.settings.num_fewshot,
            limit=self.settings.limit,
            apply_chat_template=self.settings.chat_template,
            task_manager=_task_manager(self.settings),
            random_seed=self.seed,
            numpy_random_seed=OWN_SEED + self.seed,
            torch_random_seed=OWN_SEED + self.seed,
            fewshot_random_seed=OWN_SEED + self.seed,
            bootstrap_iters=0,
        )
        assert found is not None, "only other ranks of a distributed run get nothing"
        items = tuple(
            ScoredItem(f"{task}:{line['doc_id']}", task, self.seed, float(line[_metric(task, line)]))
            for task, lines in found["samples"].items()
            for line in lines
            if line.get("filter") == lines[0].get("filter")
        )
        return ScoreSheet(self.name, candidate.name, items, "%", 100.0, by_category=True, facts=_facts(found))


def _task_manager(settings: LMEvalConfig) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=settings.include_path or None)


def _metric(task: str, line: Mapping[str, Any]) -> str:
    found = next((name for name in PREFERRED if isinstance(line.get(name), int | float)), None)
    if found is None:
        raise UserError(f"lm_eval.tasks: {task} has no score per item; choose tasks with {', '.join(PREFERRED)}")
    return found


def _facts(found: Mapping[str, Any]) -> dict[str, Any]:
    """The harness's own numbers, and the versions of its tasks."""
    results = {
        task: {name: value for name, value in values.items() if isinstance(value, int | float)}
        for task, values in found["results"].items()
    }
    return {"results": results, "versions": dict(found.get("versions", {})), "lm_eval": version("lm_eval")}
