"""What a teacher says is what a plain forward pass says, whatever the batches, chunks and padding."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import encoder, make_llama, make_qwen
from transformers import Gemma2Config, Gemma2ForCausalLM

from fusion.config.schema import TeacherConfig
from fusion.dialogues.dialogue import chat
from fusion.teaching import forward, selection
from fusion.teaching.causal_lm import has_plain_head
from fusion.teaching.forward import RowReader, pad, row_index, teacher_rows, token_batches
from fusion.teaching.selection import draw, most_likely, nucleus, uniforms

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
        torch.manual_seed(2)  # whose likeliest tokens are far from equally likely: rounding changes no order
        return Gemma2ForCausalLM(config).eval()


NAMES = [dialogue.content_hash for dialogue in DIALOGUES]


def rows_of(model, batch, vocab_size, names=NAMES, **chosen):
    """What is kept of `batch`, with five candidates per row unless `chosen` says otherwise."""
    reader = RowReader(model, vocab_size)
    return teacher_rows(reader, batch, names[: len(batch)], TeacherConfig(**({"top_k": 5} | chosen)))


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
    found = rows_of(model, batch, vocab_size, temperature=temperature)
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
    whole = rows_of(model, batch, vocab_size)
    monkeypatch.setattr(forward, "CHUNK_LOGITS", 1)
    alone = [rows_of(model, [one], vocab_size)[0] for one in batch]
    for one, other in zip(whole, alone, strict=True):
        assert (one.ids_RK == other.ids_RK).all()
        np.testing.assert_allclose(one.logprobs_RK, other.logprobs_RK, atol=2e-5)
        np.testing.assert_allclose(one.nll_R, other.nll_R, atol=2e-5)


def test_rows_that_only_the_head_has_are_never_proposed(batch, vocab_size):
    model = make_llama(vocab_size + 40)
    with torch.no_grad():
        model.lm_head.weight[vocab_size:] *= 1000
    plain = reference(model, batch[0], vocab_size, 5, 1.0)
    for rows in rows_of(model, batch, vocab_size):
        assert rows.ids_RK.max() < vocab_size
        np.testing.assert_allclose(np.exp(rows.logprobs_RK).sum(-1) + rows.tail_R, 1, atol=1e-5)
    found = rows_of(model, batch[:1], vocab_size)[0]
    np.testing.assert_allclose(found.nll_R, plain[3], atol=2e-5)


def test_more_candidates_than_tokens_are_all_tokens(batch, vocab_size):
    (rows,) = rows_of(make_llama(vocab_size), batch[:1], vocab_size, top_k=10_000)
    assert rows.ids_RK.shape[1] == vocab_size
    np.testing.assert_allclose(rows.tail_R, 0, atol=1e-5)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_refused(batch, vocab_size, poison):
    model = make_llama(vocab_size)
    with torch.no_grad():
        model.lm_head.weight[3] = poison
    with pytest.raises(FloatingPointError, match=f"NaN or infinite logits in dialogue {NAMES[0]}"):
        rows_of(model, batch, vocab_size)


def test_rows_are_broken_by_any_nan_or_infinity_but_not_by_a_sum_that_overflows():
    nan, inf = float("nan"), float("inf")
    logits_RV = torch.tensor(
        [[1, 2, 3], [3e38, 3e38, 0], [1, nan, 3], [-3e38, -3e38, 0], [inf, 0, 0], [0, 0, -inf], [inf, -inf, 0]]
    )
    assert forward._broken_rows(logits_RV).tolist() == [2, 4, 5, 6]
    assert forward._broken_rows(logits_RV[:2]).tolist() == []


def test_the_dialogue_with_broken_logits_is_named(batch, vocab_size, monkeypatch):
    chunks = RowReader.chunks

    def broken(self, given):
        seen = 0
        wanted = sum(len(one.rows_R) for one in batch[:2])  # the first row of the third dialogue
        for logits_RV, references_R in chunks(self, given):
            if seen <= wanted < seen + len(logits_RV):
                logits_RV[wanted - seen, 7] = float("nan")
            seen += len(logits_RV)
            yield logits_RV, references_R

    monkeypatch.setattr(RowReader, "chunks", broken)
    monkeypatch.setattr(forward, "CHUNK_LOGITS", 1)
    with pytest.raises(FloatingPointError, match=NAMES[2]):
        rows_of(make_llama(vocab_size), batch, vocab_size)


def in_order(logprobs_V):
    """Token ids of one row, most likely first, the lower id first among equals: the plain way."""
    return sorted(range(len(logprobs_V)), key=lambda token: (-logprobs_V[token], token))


@settings(max_examples=50)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 4), st.integers(0, 1 << 20))
def test_equals_come_in_the_order_of_their_ids(size, top_k, levels, seed):
    """Few distinct logits: nearly all tokens are equals of others, as they often are in half precision."""
    logits_RV = torch.from_numpy(np.random.default_rng(seed).integers(0, levels, (6, size))).float()
    logprobs_RV = logits_RV.log_softmax(-1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "SLACK", seed % 3)
        found = most_likely(logprobs_RV, top_k)
    for row, logprobs_V in enumerate(logprobs_RV.tolist()):
        expected = in_order(logprobs_V)[:top_k]
        assert found.ids_RK[row].tolist() == expected
        assert found.logprobs_RK[row].tolist() == [np.float32(logprobs_V[token]) for token in expected]
    np.testing.assert_allclose(np.exp(found.logprobs_RK).sum(1) + found.tail_R, 1, atol=1e-6)


@settings(max_examples=50)
@given(st.integers(1, 30), st.integers(1, 12), st.floats(0.01, 1.0), st.integers(0, 1 << 20))
def test_a_nucleus_is_the_fewest_that_hold_the_mass(size, top_k, top_p, seed):
    logits_RV = torch.from_numpy(np.random.default_rng(seed).normal(0, 3, (5, size))).float()
    likely = most_likely(logits_RV.log_softmax(-1), top_k)
    found = nucleus(likely, top_p)
    assert (found.ids_RK.dtype, found.logprobs_RK.dtype, found.tail_R.dtype) == (np.int32, np.float32, np.float32)
    for row in range(5):
        masses = np.exp(likely.logprobs_RK[row], dtype=np.float64)
        count = next((n for n in range(1, len(masses) + 1) if masses[:n].sum() >= top_p), len(masses))
        assert found.ids_RK[row].tolist() == [*likely.ids_RK[row, :count], *[-1] * (len(masses) - count)]
        assert (found.logprobs_RK[row, :count] == likely.logprobs_RK[row, :count]).all()
        assert np.isneginf(found.logprobs_RK[row, count:]).all()
        assert found.tail_R[row] == pytest.approx(max(1 - masses[:count].sum(), 0), abs=1e-6)


def test_a_nucleus_of_a_model(batch, vocab_size):
    model = make_llama(vocab_size)
    whole = rows_of(model, batch, vocab_size, top_k=8)
    for rows, full in zip(rows_of(model, batch, vocab_size, rows="nucleus", top_p=0.05, top_k=8), whole, strict=True):
        assert rows.ids_RK.shape[1] == rows.counts_R.max() <= 8  # no column that is padding only
        held_RK = rows.ids_RK >= 0
        assert (rows.ids_RK[held_RK] == full.ids_RK[:, : held_RK.shape[1]][held_RK]).all()
        assert ((np.exp(rows.logprobs_RK).sum(1) >= 0.05) | (rows.counts_R == 8)).all()
        np.testing.assert_allclose(np.exp(rows.logprobs_RK).sum(1) + rows.tail_R, 1, atol=1e-6)


def test_draws_are_unbiased():
    """Shares over many rows against the probabilities they were drawn from: Pearson's chi-squared."""
    probs_V = np.asarray([0.45, 0.25, 0.15, 0.1, 0.04, 0.01, 0.0])
    rows, draws = 20_000, 10
    logprobs_RV = torch.from_numpy(np.log(np.maximum(probs_V, 1e-300)))[None].expand(rows, -1).float()
    found = draw(logprobs_RV, uniforms("ab" * 16, rows, draws))
    shares_RK = np.where(found.ids_RK >= 0, np.exp(found.logprobs_RK, dtype=np.float64), 0)
    np.testing.assert_allclose(shares_RK.sum(1), 1, atol=1e-6)
    counts_V = np.bincount(found.ids_RK[found.ids_RK >= 0], shares_RK[found.ids_RK >= 0] * draws, len(probs_V))
    assert counts_V[-1] == 0
    expected_V = rows * draws * probs_V[:-1]
    statistic = ((counts_V[:-1] - expected_V) ** 2 / expected_V).sum()
    assert statistic < 20.5  # five degrees of freedom: one in a thousand is above
    # With replacement, so the variance of a share is that of a binomial one.
    first_R = np.where(found.ids_RK == 0, shares_RK, 0).sum(1)
    assert first_R.var() == pytest.approx(0.45 * 0.55 / draws, rel=0.05)


@given(st.integers(2, 30), st.integers(1, 60), st.integers(0, 1 << 20))
def test_draws_are_the_inverse_of_the_cumulative_distribution(size, draws, seed):
    rng = np.random.default_rng(seed)
    logprobs_RV = torch.from_numpy(rng.normal(0, 2, (4, size))).float().log_softmax(-1)
    uniforms_RN = rng.random((4, draws))
    found = draw(logprobs_RV, uniforms_RN)
    for row in range(4):
        cumulative = np.cumsum(np.exp(logprobs_RV[row].double().numpy()))
        drawn = [int((cumulative <= number * cumulative[-1]).sum()) for number in uniforms_RN[row]]
        counts = sorted((-drawn.count(token), token) for token in set(drawn))
        count = len(counts)
        assert found.ids_RK[row].tolist() == [token for _, token in counts] + [-1] * (found.ids_RK.shape[1] - count)
        np.testing.assert_allclose(
            np.exp(found.logprobs_RK[row, :count]), [-count / draws for count, _ in counts], rtol=1e-6
        )
    assert (found.tail_R == 0).all()


def test_draws_depend_on_content_and_row_only(batch, vocab_size, monkeypatch):
    model = gemma(vocab_size)  # whose logits hardly differ between batches, so that no draw is on an edge
    whole = rows_of(model, batch, vocab_size, rows="random", draws=20)
    assert any(rows.counts_R.min() < rows.counts_R.max() for rows in whole)
    monkeypatch.setattr(forward, "CHUNK_LOGITS", 1)
    backwards = rows_of(model, batch[::-1], vocab_size, NAMES[::-1], rows="random", draws=20)[::-1]
    alone = [
        rows_of(model, [one], vocab_size, [name], rows="random", draws=20)[0]
        for one, name in zip(batch, NAMES, strict=True)
    ]
    for rows, one, other in zip(whole, backwards, alone, strict=True):
        assert (rows.ids_RK == one.ids_RK).all()
        assert (rows.logprobs_RK == one.logprobs_RK).all()
        assert (rows.ids_RK == other.ids_RK).all()
        assert (rows.logprobs_RK == other.logprobs_RK).all()
    (renamed,) = rows_of(model, batch[:1], vocab_size, ["00" * 16], rows="random", draws=20)
    assert renamed.ids_RK.shape != whole[0].ids_RK.shape or (renamed.ids_RK != whole[0].ids_RK).any()


def test_uniform_numbers_differ_between_rows_and_dialogues():
    one, other = uniforms("ab" * 16, 3, 5), uniforms("cd" * 16, 3, 5)
    assert (one == uniforms("ab" * 16, 3, 5)).all()
    assert (one[:2] == uniforms("ab" * 16, 2, 5)).all()
    assert len(np.unique(np.concatenate([one, other]))) == 30
    assert ((one >= 0) & (one < 1)).all()


def test_draws_read_the_distribution_at_the_temperature(batch, vocab_size):
    """At a temperature near zero every draw is the most likely token."""
    model = make_llama(vocab_size)
    greedy = rows_of(model, batch, vocab_size, top_k=1)
    for rows, best in zip(rows_of(model, batch, vocab_size, rows="random", temperature=1e-4), greedy, strict=True):
        assert (rows.ids_RK == best.ids_RK).all()
        assert (rows.logprobs_RK == 0).all()
        np.testing.assert_allclose(rows.nll_R, best.nll_R, atol=2e-5)


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
