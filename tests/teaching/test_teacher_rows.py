"""What a teacher says is what a plain forward pass says, whatever the batches, chunks and padding."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import encoder, make_llama, make_qwen
from transformers import Gemma2Config, Gemma2ForCausalLM

from fusion.dialogues.dialogue import chat
from fusion.teaching import forward
from fusion.teaching.causal_lm import has_plain_head
from fusion.teaching.forward import RowReader, pad, row_index, teacher_rows, token_batches

DIALOGUES = [
    chat("hi", "yo"),
    chat("Which river?", "The answer is yes, not no.", "and?", "北京 👍🏽"),
    chat("", "no"),
    chat("The ratio of poles", "1:3. " * 9 + "lines"),
]


@pytest.fixture(scope="module")
def batch():
    return [encoder("byte_level", "chatml").encode(dialogue) for dialogue in DIALOGUES]


@pytest.fixture(scope="module")
def vocab_size():
    return len(encoder("byte_level", "chatml").own.tokenizer)


def gemma(vocab_size):
    """A model that caps its logits behind the head."""
    config = Gemma2Config(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        final_logit_softcapping=2.0,
        initializer_range=0.5,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Gemma2ForCausalLM(config).eval()


MAKERS = {"llama": make_llama, "qwen": make_qwen, "gemma": gemma}


@torch.no_grad()
def reference(model, encoded, vocab_size, top_k, temperature):
    """The same from all logits of one unpadded dialogue, in double precision behind the model."""
    logits_TV = model(torch.from_numpy(encoded.ids_N.astype(np.int64))[None]).logits[0, :, :vocab_size].double()
    rows_R = np.flatnonzero(encoded.supervised_N) - 1
    logits_RV = logits_TV[rows_R]
    nll_R = -logits_RV.log_softmax(-1)[range(len(rows_R)), encoded.ids_N[rows_R + 1]]
    logprobs_RK, ids_RK = (logits_RV / temperature).log_softmax(-1).topk(top_k)
    return ids_RK, logprobs_RK, 1 - logprobs_RK.exp().sum(-1), nll_R


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_rows_equal_a_plain_forward_pass(batch, vocab_size, name, temperature):
    model = MAKERS[name](vocab_size)
    found = teacher_rows(RowReader(model, vocab_size), batch, 5, temperature)
    assert len(found) == len(batch)
    for rows, encoded in zip(found, batch, strict=True):
        ids_RK, logprobs_RK, tail_R, nll_R = reference(model, encoded, vocab_size, 5, temperature)
        assert (rows.ids_RK == ids_RK.numpy()).all()
        np.testing.assert_allclose(rows.logprobs_RK, logprobs_RK, atol=2e-5)
        np.testing.assert_allclose(rows.tail_R, tail_R, atol=2e-6)
        np.testing.assert_allclose(rows.nll_R, nll_R, atol=2e-5)
        assert (rows.tail_R >= 0).all()
        assert (np.diff(rows.logprobs_RK) <= 0).all()


def test_only_models_with_a_plain_head_skip_logits(vocab_size):
    assert has_plain_head(make_llama(vocab_size))
    assert has_plain_head(make_qwen(vocab_size))
    assert not has_plain_head(gemma(vocab_size))


def test_chunks_and_batches_change_nothing(batch, vocab_size, monkeypatch):
    model = make_llama(vocab_size)
    whole = teacher_rows(RowReader(model, vocab_size), batch, 5, 1.0)
    monkeypatch.setattr(forward, "CHUNK_LOGITS", 1)
    alone = [teacher_rows(RowReader(model, vocab_size), [one], 5, 1.0)[0] for one in batch]
    for one, other in zip(whole, alone, strict=True):
        assert (one.ids_RK == other.ids_RK).all()
        np.testing.assert_allclose(one.logprobs_RK, other.logprobs_RK, atol=2e-5)
        np.testing.assert_allclose(one.nll_R, other.nll_R, atol=2e-5)


def test_rows_that_only_the_head_has_are_never_proposed(batch, vocab_size):
    model = make_llama(vocab_size + 40)
    with torch.no_grad():
        model.lm_head.weight[vocab_size:] *= 1000
    plain = reference(model, batch[0], vocab_size, 5, 1.0)
    for rows in teacher_rows(RowReader(model, vocab_size), batch, 5, 1.0):
        assert rows.ids_RK.max() < vocab_size
        np.testing.assert_allclose(np.exp(rows.logprobs_RK).sum(-1) + rows.tail_R, 1, atol=1e-5)
    found = teacher_rows(RowReader(model, vocab_size), batch[:1], 5, 1.0)[0]
    np.testing.assert_allclose(found.nll_R, plain[3], atol=2e-5)


def test_more_candidates_than_tokens_are_all_tokens(batch, vocab_size):
    (rows,) = teacher_rows(RowReader(make_llama(vocab_size), vocab_size), batch[:1], 10_000, 1.0)
    assert rows.ids_RK.shape[1] == vocab_size
    np.testing.assert_allclose(rows.tail_R, 0, atol=1e-5)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_refused(batch, vocab_size, poison):
    model = make_llama(vocab_size)
    with torch.no_grad():
        model.lm_head.weight[3] = poison
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        teacher_rows(RowReader(model, vocab_size), batch, 5, 1.0)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=40).map(sorted), st.integers(1, 100))
def test_token_batches_are_full_but_not_overfull(lengths, limit):
    batches = list(token_batches(lengths, limit))
    assert [place for one in batches for place in one] == list(range(len(lengths)))
    for number, one in enumerate(batches):
        width = max(lengths[place] for place in one)
        assert len(one) == 1 or len(one) * width <= limit
        if number + 1 < len(batches):
            assert (len(one) + 1) * lengths[batches[number + 1][0]] > limit


def test_padding_and_row_positions(batch):
    ids_BT, mask_BT = pad([one.ids_N for one in batch], torch.device("cpu"))
    rows_R, references_R = row_index(batch, ids_BT.shape[1], torch.device("cpu"))
    flat = ids_BT.flatten()
    assert (flat[rows_R + 1] == references_R).all()
    assert mask_BT.sum().item() == sum(len(one.ids_N) for one in batch)
    assert (ids_BT[mask_BT == 0] == 0).all()
    assert len(rows_R) == sum(one.supervised_N.sum() for one in batch)
    assert (mask_BT.flatten()[rows_R] == 1).all()
