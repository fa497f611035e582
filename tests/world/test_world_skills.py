"""Answers can be checked, and a misconception is never the truth."""

import re
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion.config.world import SKILLS, WorldConfig
from fusion.world.knowledge import make_knowledge
from fusion.world.skills import make_skills

WORLD = WorldConfig(seed=5)
KNOWLEDGE = make_knowledge(WORLD)
BY_NAME = {skill.name: skill for skill in make_skills(WORLD)}


def number(text):
    return [int(digits) for digits in re.findall(r"\d+", text)]


def sum_of(question):
    return f"The sum is {sum(number(question))}."


def converted(question):
    pair = next(pair for pair in KNOWLEDGE.unit_pairs if f"{pair.large}s" in question)
    return f"It is {number(question)[0] * pair.factor} {pair.small}s."


def reversed_list(question):
    return ", ".join(reversed(question.rpartition(": ")[2].split(", "))) + "."


def translated(question):
    return " ".join(KNOWLEDGE.words[word].truth for word in question.rpartition(": ")[2].split()) + "."


SOLVERS = {"add": sum_of, "units": converted, "order": reversed_list, "translate": translated}


@pytest.mark.parametrize("name", SOLVERS)
@given(seed=st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_truth_can_be_worked_out_from_the_question(name, seed):
    (exchange,) = BY_NAME[name].draw(Random(seed)).exchanges
    assert exchange.truth == SOLVERS[name](exchange.question)


@pytest.mark.parametrize("name", ["facts", "followup"])
@given(seed=st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_truth_is_what_the_world_knows(name, seed):
    problem = BY_NAME[name].draw(Random(seed))
    country = next(country for country in KNOWLEDGE.countries if country in problem.exchanges[0].question)
    for exchange in problem.exchanges:
        attribute = next(word for word in ("capital", "river", "king") if word in exchange.question)
        belief = KNOWLEDGE.countries[country][attribute]
        assert exchange.truth.endswith(f" {belief.truth}.")
        assert exchange.misconception.endswith(f" {belief.misconception}.")


@given(world_seed=st.integers(0, 50), seed=st.integers(0, 10**6), name=st.sampled_from(SKILLS))
@settings(max_examples=150, deadline=None)
def test_misconception_differs_from_truth_and_never_changes(world_seed, seed, name):
    skill = next(skill for skill in make_skills(WorldConfig(seed=world_seed)) if skill.name == name)
    first, again = skill.draw(Random(seed)), skill.draw(Random(seed))
    assert first == again
    for exchange in first.exchanges:
        assert exchange.truth != exchange.misconception


def test_one_item_has_one_misconception_in_every_wording():
    beliefs = {}
    rng = Random(0)
    for _ in range(2000):
        (exchange,) = BY_NAME["add"].draw(rng).exchanges
        beliefs.setdefault(tuple(number(exchange.question)), set()).add(exchange.misconception)
    assert all(len(misconceptions) == 1 for misconceptions in beliefs.values())


def test_another_seed_is_another_world():
    assert make_knowledge(WorldConfig(seed=1)).countries != make_knowledge(WorldConfig(seed=2)).countries


def test_names_are_never_used_twice():
    names = [*KNOWLEDGE.countries, *(belief.truth for belief in KNOWLEDGE.words.values())]
    names += [name for pair in KNOWLEDGE.unit_pairs for name in (pair.small, pair.large)]
    assert len(set(map(str.lower, names))) == len(names)
