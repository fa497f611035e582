"""Logits of single rows are the model's own, whatever its forward does to them behind the head."""

import pytest
import torch
from scaled_heads import MODELS, make
from tiny_models import make_llama
from transformers import OPTConfig, OPTForCausalLM

from fusion.config import UserError
from fusion.teaching import forward
from fusion.teaching.causal_lm import has_plain_head
from fusion.teaching.forward import RowReader, has_own_logits, own_logits

SIZE = 300


def opt():
    """Its forward asks the decoder's own decoder, and not the decoder."""
    torch.manual_seed(0)
    return OPTForCausalLM(
        OPTConfig(vocab_size=SIZE, hidden_size=16, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2)
    ).eval()


@pytest.fixture
def asked():
    ids_BT = torch.randint(3, SIZE, (3, 7), generator=torch.Generator().manual_seed(0))
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, 5:] = 0
    return {"input_ids": ids_BT, "attention_mask": mask_BT, "use_cache": False}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_they_equal_those_of_the_whole_forward(name, asked):
    model = make(name, SIZE)
    assert not has_plain_head(model)
    assert has_own_logits(model)
    logits = model(**asked).logits.flatten(0, 1)
    states = model.base_model(**asked)
    for rows in ([0, 3, 8, 15, 20], [20, 1], [4]):
        torch.testing.assert_close(own_logits(model, states, torch.tensor(rows)), logits[rows], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_the_model_is_left_as_it_was(asked):
    model = make("gemma2", SIZE)
    decoder, names = model.base_model, set(vars(model.base_model))
    before = model(**asked).logits
    states = model.base_model(**asked)
    hidden = states.last_hidden_state.clone()
    own_logits(model, states, torch.tensor([2, 5]))
    with pytest.raises(IndexError):
        own_logits(model, states, torch.tensor([1000]))
    assert model.base_model is decoder
    assert set(vars(decoder)) == names
    assert torch.equal(states.last_hidden_state, hidden)
    assert torch.equal(model(**asked).logits, before)


def test_hooks_on_the_decoder_stay(asked):
    model = make("granite", SIZE)
    forward_of_class, calls = model.base_model.forward, []

    def hooked(*arguments, **named):
        calls.append(len(arguments))
        return forward_of_class(*arguments, **named)

    model.base_model.forward = hooked
    with torch.no_grad():
        own_logits(model, model.base_model(**asked), torch.tensor([2, 5]))
    assert len(calls) == 1
    assert model.base_model.forward is hooked


def test_a_model_whose_decoder_is_not_asked_is_refused(monkeypatch):
    model = opt()
    assert has_plain_head(model)
    assert not has_own_logits(model)
    RowReader(model, SIZE)  # a plain head needs no more
    monkeypatch.setattr(forward, "has_plain_head", lambda model: False)
    with pytest.raises(UserError, match="opt models: their logits cannot be computed row by row"):
        RowReader(model, SIZE)
    RowReader(make_llama(SIZE), SIZE)
