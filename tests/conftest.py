"""Fixtures that several parts share."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings

# No deadlines, and examples may be drawn slowly: other work on the machine is no bug. The same examples in every run,
# so that a commit passes or fails; `--hypothesis-profile=search` looks for new ones.
patient = hypothesis_settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
hypothesis_settings.register_profile("repeatable", patient, derandomize=True)
hypothesis_settings.register_profile("search", patient)
hypothesis_settings.load_profile("repeatable")

# Before anything is imported, and for all processes that tests start.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB__SERVICE_WAIT", "600")  # seconds that W&B's own process may take to start
for name in ("no_proxy", "NO_PROXY"):  # no proxy stands before the tests' own servers
    os.environ[name] = ",".join(filter(None, (os.environ.get(name), "127.0.0.1", "localhost")))

TEST_CACHE = Path(os.environ.get("FUSION_TEST_CACHE") or Path(__file__).parent / ".cache")


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium; who asks for it is skipped where there is none."""
    from browser import open_browser

    with open_browser() as found:
        yield found


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


@pytest.fixture(scope="session")
def tiny_pivot(tmp_path_factory):
    """Settings of a random Llama with a SentencePiece-like tokeniser and OpenChat's template."""
    from tiny_models import make_llama, make_tokenizer, save

    tokenizer = make_tokenizer("metaspace", "openchat")
    return save(tmp_path_factory.mktemp("pivot"), make_llama(len(tokenizer)), tokenizer, "pivot")


@pytest.fixture(scope="session")
def tiny_source(tmp_path_factory):
    """Settings of a random Qwen2: tied weights, byte-level BPE, ChatML, more embedded rows than tokens."""
    from tiny_models import make_qwen, make_tokenizer, save

    tokenizer = make_tokenizer("byte_level", "chatml")
    padded = -(-len(tokenizer) // 64) * 64 + 64
    return save(tmp_path_factory.mktemp("source"), make_qwen(padded, seed=1), tokenizer, "source")
