"""Impossible worlds are refused with every reason at once."""

from dataclasses import replace

import pytest

from fusion.config import UserError
from fusion.config.world import TinyModelConfig, WorldConfig
from fusion.world import ensure_world
from fusion.world.checks import check_world


def test_the_default_world_is_possible():
    assert check_world(WorldConfig()) == []


def test_all_problems_are_listed_at_once(tmp_path):
    models = {"pivot": TinyModelConfig(architecture="lama", hidden_size=90, steps=0)}
    world = WorldConfig(skills=["facts", "sing"], sources=["tiny_a"], models=models, corpus_noise=2, words=500)
    with pytest.raises(UserError) as error:
        ensure_world(world, tmp_path)
    text = "\n".join(error.value.problems)
    for part in ("'lama'", "hidden_size=90", "steps=0", "'sing'", "'tiny_a'", "corpus_noise=2", "words=500"):
        assert part in text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "changes",
    [
        {"heldout_share": 0.5, "test_share": 0.5},
        {"skills": []},
        {"models": {}, "sources": []},
        {"countries": 0},
    ],
)
def test_single_problems(changes):
    assert len(check_world(replace(WorldConfig(), **changes))) == 1
