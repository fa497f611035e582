"""Fixtures that several parts share."""

import os
from pathlib import Path

import pytest

TEST_CACHE = Path(os.environ.get("FUSION_TEST_CACHE") or Path(__file__).parent / ".cache")


@pytest.fixture(scope="session")
def smoke_world():
    """The smallest complete world, built once and kept in a cache between sessions."""
    from hydra import compose, initialize_config_dir

    from fusion.config.compose import CONFIG_FOLDER, register, to_settings
    from fusion.config.schema import TrainConfig
    from fusion.world import ensure_world

    register()
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        settings = to_settings(compose("train", overrides=["world=smoke"]), TrainConfig)
    return ensure_world(settings.world, TEST_CACHE)
