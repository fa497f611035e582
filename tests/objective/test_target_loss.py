"""The losses of every kind of targets equal dense formulas, in value and gradients, whatever the chunks and shapes."""

import pytest
import torch
from dense_losses import (
    FEW,
    FORMS,
    assert_close,
    assert_same,
    chunks,
    gradients,
    inputs_of,
    is_certain,
    logits_of,
    shapes,
    span_distance,
    stage1_loss,
    targets_of,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fusion.objective.sparse_loss import sparse_cross_entropy
from fusion.objective.target_loss import Head, Targets, bernoulli_divergence, target_loss

lambdas = st.sampled_from([0.0, 0.2, 0.9, 1.0])


@pytest.mark.parametrize("name", FORMS)
@settings(max_examples=100, deadline=None)
@given(shape=shapes, chunk=chunks, ce_weight=lambdas)
def test_value_and_gradients_equal_the_dense_formula(name, shape, chunk, ce_weight):
    form, inputs = FORMS[name], inputs_of(**shape)
    targets = targets_of(form, **shape)
    assume(name != "spans" or not is_certain(logits_of(inputs[0], Head(*inputs[1:])), targets))
    found = target_loss(inputs[0], Head(*inputs[1:]), targets, form, ce_weight, chunk)
    loss, ce, fusion = stage1_loss(inputs[0], Head(*inputs[1:]), targets, form, ce_weight)
    assert_same(found.loss, loss, inputs)
    assert_close(found.ce, ce)
    assert_close(found.fusion, fusion)
    assert not found.ce.requires_grad
    assert not found.fusion.requires_grad


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("seed", [0, 3, 5])
def test_gradcheck(name, seed):
    form, (hidden, head, bias) = FORMS[name], inputs_of(**FEW, seed=seed)
    targets = targets_of(form, **FEW, seed=seed)
    assert (targets.weights_RK[:, 1:] > 0).any()

    def loss(*inputs):
        return target_loss(inputs[0], Head(*inputs[1:]), targets, form, 0.3, 2).loss

    assert torch.autograd.gradcheck(loss, (hidden, head, bias))


def test_scaled_tokens_are_the_plain_sparse_cross_entropy():
    form, (hidden, head, bias) = FORMS["scale"], inputs_of(**FEW, seed=5)
    targets = targets_of(form, **FEW, seed=5)
    share = torch.tensor([[0.9, 0.1, 0.1, 0.1]], dtype=torch.float64)
    expected = sparse_cross_entropy(hidden, head, targets.ids_RK, targets.weights_RK * share, bias_V=bias)
    assert_close(target_loss(hidden, Head(head, bias), targets, form, 0.9).loss, expected, 1e-14)


def test_a_full_row_has_no_bucket_and_an_empty_row_no_loss():
    hidden, head, bias = inputs_of(**FEW, seed=6)
    ids = torch.tensor([[0, 1, 2], [0, 3, 0], [0, 0, 0]])
    weights = torch.tensor([[1, 0.25, 0.75], [1, 1.0, 0.0], [1, 0.0, 0.0]], dtype=torch.float64)
    one, other = (
        target_loss(hidden[:3], Head(head, bias), Targets(ids, weights), FORMS[name], 0.5)
        for name in ("scale", "bucket")
    )
    assert_close(one.loss, other.loss)
    assert_close(one.fusion, other.fusion)


def test_a_bucket_over_the_whole_vocabulary_is_ignored():
    hidden, head, bias = inputs_of(2, 3, 2, seed=0, bias=True)
    targets = Targets(torch.tensor([[0, 0, 1]] * 2), torch.tensor([[1, 0.2, 0.3]] * 2, dtype=torch.float64))
    found = target_loss(hidden, Head(head, bias), targets, FORMS["bucket"], 0.5)
    loss, _, _ = stage1_loss(hidden, Head(head, bias), targets, FORMS["bucket"], 0.5)
    assert_same(found.loss, loss, (hidden, head, bias))


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
def test_certain_models_in_single_precision_have_finite_losses(name, scale):
    form, shape = FORMS[name], FEW | {"rows": 40, "vocab": 30}
    hidden, head, bias = inputs_of(**shape, seed=7, scale=scale, dtype=torch.float32)
    ids, weights = targets_of(form, **shape, seed=7)
    with torch.no_grad():  # some references are what the model is certain of
        ids[::2, 0] = torch.nn.functional.linear(hidden, head, bias).argmax(-1)[::2]
    found = target_loss(hidden, Head(head, bias), Targets(ids, weights.float()), form, 0.5, 7)
    assert found.loss.dtype == torch.float32
    assert torch.isfinite(found.loss)
    assert all(torch.isfinite(one).all() for one in gradients(found.loss, (hidden, head, bias)))


def test_a_small_tail_does_not_cancel_in_single_precision():
    hidden, head, bias = inputs_of(20, 4, 30, seed=8, bias=True, scale=6.0)
    likely = torch.nn.functional.linear(hidden, head, bias).topk(2).indices
    weights = torch.tensor([[1, 0.6, 0.3999]] * 20, dtype=torch.float64)
    ids = torch.cat([likely[:, :1], likely], 1)
    exact = target_loss(hidden, Head(head, bias), Targets(ids, weights), FORMS["bucket"], 0.0)
    single = [one.detach().float().requires_grad_() for one in (hidden, head, bias)]
    found = target_loss(single[0], Head(*single[1:]), Targets(ids, weights.float()), FORMS["bucket"], 0.0)
    torch.testing.assert_close(found.loss.double(), exact.loss, rtol=1e-5, atol=0)
    for one, other in zip(gradients(found.loss, single), gradients(exact.loss, (hidden, head, bias)), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-3, atol=1e-5 * float(other.abs().max()))


@pytest.mark.parametrize("temperature", [1.0, 100.0])
def test_a_span_that_both_read_alike_costs_nothing(temperature):
    logs = torch.tensor([-1e-3, -0.5, -3.0, -40.0], dtype=torch.float64, requires_grad=True)
    teacher = (logs.detach() / temperature).exp()
    found = bernoulli_divergence(teacher, logs, temperature)
    assert_close(found.detach(), torch.zeros(4, dtype=torch.float64), 1e-9)
    assert_close(torch.autograd.grad(found.sum(), logs)[0], torch.zeros(4, dtype=torch.float64), 1e-9)
    assert (bernoulli_divergence(teacher * 0.9, logs, temperature) > 0).all()


def test_a_certain_teacher_makes_a_span_a_cross_entropy():
    logs = torch.tensor([-1e-3, -0.5, -40.0], dtype=torch.float64)
    assert_close(bernoulli_divergence(torch.ones(3, dtype=torch.float64), logs, 100.0), -logs)


def test_a_span_counts_once_and_the_cut_into_chunks_does_not_matter():
    form, (hidden, head, bias) = FORMS["spans"], inputs_of(**FEW, seed=9)
    ids = torch.tensor([[0, 0], [1, 0], [2, 0], [3, 3], [4, 3], [5, 0]])
    weights = torch.tensor([[1.0, 0.7]] * 3 + [[1.0, 0.2]] * 2 + [[1.0, 0.0]], dtype=torch.float64)
    logprobs = torch.nn.functional.linear(hidden, head, bias).log_softmax(-1)[range(6), range(6)]
    wanted = span_distance(logprobs[:3].sum(), 0.7, 3.0) + span_distance(logprobs[3:5].sum(), 0.2, 3.0)
    for chunk in (1, 2, 4, 6):
        found = target_loss(hidden, Head(head, bias), Targets(ids, weights), form, 0.0, chunk)
        assert_close(found.fusion, wanted.detach())


def test_ranks_do_not_look_at_tokens_or_at_the_rest_of_the_batch():
    form, (hidden, head, bias) = FORMS["ranks"], inputs_of(**FEW, seed=10)
    targets = targets_of(form, **FEW, seed=10)
    whole = target_loss(hidden, Head(head, bias), targets, form, 0.0).fusion
    rows = [
        target_loss(
            hidden[row : row + 1], Head(head, bias), Targets(*(one[row : row + 1] for one in targets)), form, 0
        )
        for row in range(6)
    ]
    assert_close(sum(one.fusion for one in rows), whole)
    shuffled = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    moved = target_loss(hidden, Head(head[shuffled], bias[shuffled]), targets, form, 0.0).fusion
    assert_close(moved, whole)


@pytest.mark.parametrize("name", ["bucket", "ranks", "spans"])
def test_low_precision_is_close(name):
    form, shape = FORMS[name], FEW | {"rows": 50, "vocab": 40}
    hidden, head, bias = inputs_of(**shape, seed=11)
    targets = targets_of(form, **shape, seed=11)
    exact = target_loss(hidden, Head(head, bias), targets, form, 0.5, 7)
    wanted = gradients(exact.loss, (hidden, head, bias))
    low = [one.detach().bfloat16().requires_grad_() for one in (hidden, head, bias)]
    float32 = Targets(targets.ids_RK, targets.weights_RK.float())
    plain = target_loss(low[0], Head(*low[1:]), float32, form, 0.5, 7).loss
    single = [one.detach().float().requires_grad_() for one in (hidden, head, bias)]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = target_loss(single[0], Head(*single[1:]), float32, form, 0.5, 7).loss
    for loss, inputs in ((plain, low), (mixed, single)):
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), exact.loss, rtol=0.03, atol=0)
        for one, other in zip(gradients(loss, inputs), wanted, strict=True):
            assert (one.double() - other).norm() < 0.1 * other.norm()


@pytest.mark.parametrize("name", FORMS)
def test_logits_of_all_rows_never_exist(name):
    """The largest tensor that is kept for the backward pass is no bigger than the inputs."""
    form, shape = FORMS[name], FEW | {"rows": 64, "vocab": 500}
    hidden, head, bias = inputs_of(**shape, seed=12)
    targets = targets_of(form, **shape, seed=12)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one.numel()) or one, lambda one: one):
        loss = target_loss(hidden, Head(head, bias), targets, form, 0.5, 4).loss
    loss.backward()
    assert max(kept) <= max(hidden.numel(), head.numel())
