"""Who reads what: the training text of every model, the fusion corpora, the tests.

All prompts are divided by hash into three splits. Training text of models and the fusion corpus come from the first,
held-out dialogues from the second, tests from the third, so nothing leaks whatever is drawn.
"""

import hashlib
from collections.abc import Iterator
from enum import StrEnum
from random import Random

from fusion.config import UserError
from fusion.config.world import PIVOT, WorldConfig
from fusion.dialogues.dialogue import Dialogue, chat
from fusion.world.skills import Problem, Skill, make_skills

PATIENCE = 200  # draws per wanted problem before a split counts as exhausted


class Split(StrEnum):
    TRAIN = "train"
    HELDOUT = "heldout"
    TEST = "test"


def split_of(skill: Skill, problem: Problem, config: WorldConfig) -> Split:
    """The split of a problem, by hash: the same for every corpus of the world."""
    digest = hashlib.sha256(f"{config.seed}\n{skill.name}\n{problem.held_out_by}".encode()).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    if share < config.test_share:
        return Split.TEST
    return Split.HELDOUT if share < config.test_share + config.heldout_share else Split.TRAIN


def fusion_corpus(split: Split, config: WorldConfig) -> list[Dialogue]:
    """The dialogues of one split: careless ones for train and heldout, the truth for test; no prompt occurs twice."""
    counts = {
        Split.TRAIN: config.train_dialogues,
        Split.HELDOUT: config.heldout_dialogues,
        Split.TEST: config.test_prompts,
    }
    noise = 0.0 if split is Split.TEST else config.corpus_noise
    dialogues = []
    for skill in make_skills(config):
        rng = Random(f"{config.seed}/{split}/{skill.name}")
        problems = _distinct(skill, split, counts[split], config, rng)
        dialogues += [_answered(skill, problem, noise, rng) for problem in problems]
    Random(f"{config.seed}/{split}/order").shuffle(dialogues)
    return dialogues


def model_corpus(model: str, config: WorldConfig) -> list[Dialogue]:
    """The training text of `model`, in random order; prompts come back, with answers of their own each time."""
    noise = config.pivot_noise if model == PIVOT else config.source_noise
    counts = _counts(model, config, config.pivot_dialogues, config.strong_dialogues, config.weak_dialogues)
    return _model_text(f"model/{model}", counts, noise, config)


def tokenizer_corpus(model: str, config: WorldConfig) -> list[Dialogue]:
    """The text on which the tokeniser of `model` is trained: what the model reads, less of it, and all of it true."""
    many, few = config.tokenizer_dialogues, config.tokenizer_weak_dialogues
    return _model_text(f"tokenizer/{model}", _counts(model, config, many, many, few), 0.0, config)


def strong_skills(model: str, config: WorldConfig) -> list[str]:
    """The strong skills of `model` that this world has, in the world's order."""
    return [skill for skill in config.skills if skill in config.models[model].strong_skills]


def _counts(model: str, config: WorldConfig, pivot: int, strong: int, weak: int) -> dict[str, int]:
    if model == PIVOT:
        return dict.fromkeys(config.skills, pivot)
    mine = strong_skills(model, config)
    return {skill: strong if skill in mine else weak for skill in config.skills}


def _model_text(stream: str, counts: dict[str, int], noise: float, config: WorldConfig) -> list[Dialogue]:
    dialogues = []
    for skill in make_skills(config):
        rng = Random(f"{config.seed}/{stream}/{skill.name}")
        problems = _draws(skill, Split.TRAIN, config, rng)
        dialogues += [_answered(skill, next(problems), noise, rng) for _ in range(counts[skill.name])]
    Random(f"{config.seed}/{stream}/order").shuffle(dialogues)
    return dialogues


def _draws(skill: Skill, split: Split, config: WorldConfig, rng: Random) -> Iterator[Problem]:
    while True:
        problem = skill.draw(rng)
        if split_of(skill, problem, config) is split:
            yield problem


def _distinct(skill: Skill, split: Split, count: int, config: WorldConfig, rng: Random) -> list[Problem]:
    """`count` problems of `split` with different prompts."""
    problems: dict[tuple[str, ...], Problem] = {}
    for _ in range(PATIENCE * count):
        if len(problems) == count:
            break
        problem = skill.draw(rng)
        if split_of(skill, problem, config) is split:
            problems.setdefault(problem.prompt, problem)
    if len(problems) < count:
        raise UserError(
            f"world: the skill {skill.name} has only about {len(problems)} different {split} prompts, not {count}; "
            f"ask for fewer dialogues or make the world larger"
        )
    return list(problems.values())


def _answered(skill: Skill, problem: Problem, noise: float, rng: Random) -> Dialogue:
    """The dialogue in which every answer on its own is the misconception with probability `noise`."""
    turns = []
    for exchange in problem.exchanges:
        careless = rng.random() < noise
        turns += [exchange.question, exchange.misconception if careless else exchange.truth]
    return chat(*turns, category=skill.name)
