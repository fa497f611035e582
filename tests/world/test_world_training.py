"""The plain training loop."""

from itertools import islice
from random import Random

import numpy as np
import pytest
import torch

from fusion.config.world import TinyModelConfig, WorldConfig
from fusion.dialogues.encode import Encoder
from fusion.dialogues.template import chat_format
from fusion.world.corpora import model_corpus
from fusion.world.models import make_model
from fusion.world.tokenizers import make_tokenizer
from fusion.world.training import bucketed_batches, schedule, supervised_loss, train

SMALL = TinyModelConfig(
    hidden_size=16, layers=1, heads=2, key_value_heads=1, vocab_size=400, steps=12, learning_rate=0.01
)
WORLD = WorldConfig(
    skills=["add"], sources=[], models={"pivot": SMALL}, pivot_dialogues=60, tokenizer_dialogues=60, batch_size=8
)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer("pivot", WORLD)


@pytest.fixture(scope="module")
def examples(tokenizer):
    encoder = Encoder(chat_format(tokenizer, "pivot"))
    return [encoder.encode(dialogue) for dialogue in model_corpus("pivot", WORLD)]


def trained(tokenizer, examples):
    model = make_model(SMALL, tokenizer, 0.1, seed=0)
    train(model, examples, SMALL, WORLD, "order", lambda step: None)
    return model


def test_an_epoch_shows_every_example_once():
    lengths = [5 + i % 7 for i in range(100)]
    batches = list(islice(bucketed_batches(lengths, 8, Random(0)), 13))
    assert sorted(i for batch in batches for i in batch) == list(range(100))


def test_schedule_rises_and_falls():
    shares = [schedule(step, 100, WORLD) for step in range(100)]
    assert max(shares) == 1
    assert shares[:5] == sorted(shares[:5])
    assert shares[5:] == sorted(shares[5:], reverse=True)
    assert shares[-1] == pytest.approx(WORLD.final_learning_rate_share, abs=1e-3)


def test_padding_does_not_change_the_loss(tokenizer, examples):
    model = make_model(SMALL, tokenizer, 0.1, seed=0)
    few = sorted(examples, key=lambda example: len(example.ids_N))[:: len(examples) // 4]
    with torch.no_grad():
        together = supervised_loss(model, few).item()
        alone = [supervised_loss(model, [example]).item() for example in few]
    rows = [len(example.rows_R) for example in few]
    assert together == pytest.approx(np.average(alone, weights=rows), rel=1e-4)


def test_training_learns_and_repeats_itself(tokenizer, examples):
    before = supervised_loss(make_model(SMALL, tokenizer, 0.1, seed=0), examples).item()
    one, other = trained(tokenizer, examples), trained(tokenizer, examples)
    assert supervised_loss(one, examples).item() < before - 1
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt_neox", "mistral"])
def test_padded_vocabulary_and_global_random_state(tokenizer, architecture):
    settings = TinyModelConfig(architecture=architecture, hidden_size=16, layers=1, heads=2, key_value_heads=2)
    state = torch.random.get_rng_state()
    model = make_model(TinyModelConfig(**{**vars(settings), "vocab_multiple": 64}), tokenizer, 0.1, seed=0)
    assert model.get_output_embeddings().weight.shape[0] % 64 == 0
    assert model.get_output_embeddings().weight.shape[0] >= len(tokenizer)
    assert torch.equal(state, torch.random.get_rng_state())
