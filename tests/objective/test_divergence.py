"""Forward KL, reverse KL and JSD equal dense formulas, value and all gradients, and are what their names promise."""

import math

import pytest
import torch
from dense_losses import (
    FEW,
    FORMS,
    assert_close,
    assert_same,
    chunks,
    divergence,
    entries_drawn,
    gradients,
    inputs_of,
    logits_of,
    on_support,
    shapes,
    stage1_loss,
    targets_of,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fusion.objective.divergence import LEAST_TAIL, Divergence, SparseTargets, forward_kl, jsd, reverse_kl
from fusion.objective.head import Head
from fusion.objective.sparse_loss import sparse_cross_entropy
from fusion.objective.target_loss import Targets, target_loss

LOSSES = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jsd": jsd}
TAILS = ("scale", "bucket")
temperatures = st.sampled_from([0.5, 1.0, 2.0, 7.0])


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=60)
@given(shape=shapes, chunk=chunks, temperature=temperatures)
@example({"rows": 4, "hidden": 2, "vocab": 2, "entries": 5, "seed": 1, "bias": True}, 3, 2.0)  # nothing is outside
def test_value_and_gradients_equal_the_dense_formula(name, tail, shape, chunk, temperature):
    inputs = inputs_of(**shape)
    head, (ids, weights) = Head(*inputs[1:]), entries_drawn(**shape)
    found = LOSSES[name](inputs[0], head, ids, weights, temperature=temperature, tail=tail, chunk_size=chunk)
    wanted = on_support(Divergence(name, temperature), inputs[0], head, ids, weights, tail == "bucket")
    assert found.shape == ()
    assert found.dtype == torch.float64
    assert_same(found, wanted, inputs)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=30)
@given(shape=shapes, chunk=chunks, temperature=temperatures, ce_weight=st.sampled_from([0.0, 0.3, 1.0]))
def test_beside_the_references_cross_entropy(name, tail, shape, chunk, temperature, ce_weight):
    """Whose temperature is always 1; the references may be in the support or not."""
    inputs, form, chosen = inputs_of(**shape), FORMS[tail], Divergence(name, temperature)
    head, targets = Head(*inputs[1:]), targets_of(FORMS[tail], **shape)
    found = target_loss(inputs[0], head, targets, form, ce_weight, chunk, chosen)
    loss, ce, fusion = stage1_loss(inputs[0], head, targets, form, ce_weight, chosen)
    assert_same(found.loss, loss, inputs)
    assert_close(found.ce, ce)
    assert_close(found.fusion, fusion)
    assert not found.ce.requires_grad
    assert not found.fusion.requires_grad


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name, tail):
    ids, weights = entries_drawn(**FEW, seed=4)

    def loss(hidden, weight, bias):
        return LOSSES[name](hidden, Head(weight, bias), ids, weights, temperature=1.7, tail=tail, chunk_size=2)

    assert torch.autograd.gradcheck(loss, inputs_of(**FEW, seed=4), fast_mode=True)


def test_forward_kl_is_the_sparse_cross_entropy():
    hidden, weight, bias = inputs_of(**FEW, seed=1)
    ids, weights = entries_drawn(**FEW, seed=1)
    wanted = sparse_cross_entropy(hidden, weight, ids, weights, bias_V=bias)
    assert_same(forward_kl(hidden, Head(weight, bias), ids, weights), wanted, (hidden, weight, bias))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("name", LOSSES)
def test_a_model_that_says_the_target_is_at_the_minimum(name, temperature):
    """With the whole vocabulary as support: no gradient, and no value where the entropy does not count."""
    hidden, weight, bias = inputs_of(**FEW, seed=2)
    ids = torch.arange(9).repeat(6, 1)
    target = (logits_of(hidden, Head(weight, bias)) / temperature).softmax(-1).detach()
    for tail in TAILS:
        found = LOSSES[name](hidden, Head(weight, bias), ids, target, temperature=temperature, tail=tail)
        entropy = -(temperature**2) * (target * target.log()).sum() if name == "forward_kl" else torch.zeros(())
        assert_close(found, entropy.double(), 1e-11)
        assert all(one.abs().max() < 1e-11 for one in gradients(found, (hidden, weight, bias)))


@pytest.mark.parametrize("tail", TAILS)
def test_jsd_is_bounded_and_reverse_kl_is_not(tail):
    hidden, weight, _ = inputs_of(**FEW, seed=3, scale=50.0)
    ids, weights = entries_drawn(**FEW, seed=3)
    rows = int((weights > 0).any(-1).sum())
    assert 0 < jsd(hidden, weight, ids, weights, temperature=2.0, tail=tail) <= 4 * rows * math.log(2)
    assert reverse_kl(hidden, weight, ids, weights, temperature=2.0, tail=tail) > 4 * rows * math.log(2)


def test_a_target_without_a_tail_still_has_a_little_in_its_bucket():
    """Or reverse KL would be infinite: all of what the model says is outside."""
    logits, head = torch.tensor([[0.0, 0.0, 60.0]], dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    ids, weights = torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.5]], dtype=torch.float64)
    found = reverse_kl(logits, head, ids, weights)
    bucket = reverse_kl(logits, head, ids, weights, tail="bucket")
    assert float(found) == pytest.approx(0, abs=1e-15)
    assert float(bucket) == pytest.approx(-math.log(LEAST_TAIL / (1 + LEAST_TAIL)), rel=1e-12)


def test_temperature_keeps_the_size_of_a_far_gradient():
    """T^2 undoes what dividing logits does to the gradient: towards high temperatures it has a limit."""
    hidden, weight, _ = inputs_of(**FEW, seed=5)
    ids = torch.arange(9).repeat(6, 1)
    # A target that is softened too, as teacher.temperature does it.
    theirs = torch.randn(6, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def gradient(temperature):
        target = (theirs / temperature).softmax(-1)
        return gradients(forward_kl(hidden, weight, ids, target, temperature=temperature), (hidden,))[0]

    assert 0.5 < gradient(2.0).norm() / gradient(50.0).norm() < 2
    assert (gradient(1e3) - gradient(1e4)).norm() < 1e-2 * gradient(1e4).norm()


@given(
    st.lists(st.lists(st.tuples(st.integers(0, 4), st.sampled_from([0.0, 0.1, 0.4])), min_size=4, max_size=4)),
)
def test_repeated_ids_are_one_entry(rows):
    table = torch.tensor(rows, dtype=torch.float64).reshape(-1, 4, 2)
    merged = SparseTargets(table[..., 0].long(), table[..., 1], has_bucket=True).merged()
    for row, ids, weights in zip(rows, merged.ids_TK.tolist(), merged.weights_TK.tolist(), strict=True):
        wanted = {}
        for token, weight in row:
            wanted[token] = wanted.get(token, 0.0) + weight
        found = [(token, weight) for token, weight in zip(ids, weights, strict=True) if weight > 0]
        assert len(found) == len({token for token, _ in found})
        assert dict(found) == pytest.approx({token: weight for token, weight in wanted.items() if weight > 0})


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
def test_certain_models_in_single_precision_have_finite_losses(name, tail, scale):
    shape = FEW | {"rows": 40, "vocab": 30}
    hidden, weight, bias = inputs_of(**shape, seed=7, scale=scale, dtype=torch.float32)
    ids, weights = entries_drawn(**shape, seed=7)
    found = LOSSES[name](hidden, Head(weight, bias), ids, weights.float(), temperature=2.0, tail=tail, chunk_size=7)
    assert found.dtype == torch.float32
    assert torch.isfinite(found)
    assert all(torch.isfinite(one).all() for one in gradients(found, (hidden, weight, bias)))


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("name", LOSSES)
def test_low_precision_is_close(name, tail):
    """bfloat16 weights, and bfloat16 autocast of float32 ones."""
    shape = FEW | {"rows": 50, "vocab": 40}
    inputs = inputs_of(**shape, seed=11)
    ids, weights = entries_drawn(**shape, seed=11)

    def loss(hidden, weight, bias):
        return LOSSES[name](hidden, Head(weight, bias), ids, weights.float(), tail=tail, chunk_size=7)

    exact = on_support(Divergence(name), inputs[0], Head(*inputs[1:]), ids, weights, tail == "bucket")
    wanted = gradients(exact, inputs)
    low = [one.detach().bfloat16().requires_grad_() for one in inputs]
    single = [one.detach().float().requires_grad_() for one in inputs]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = loss(*single)
    for found, own in ((loss(*low), low), (mixed, single)):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), exact, rtol=0.03, atol=0)
        for one, other, leaf in zip(gradients(found, own), wanted, own, strict=True):
            assert one.dtype == leaf.dtype
            assert (one.double() - other).norm() < 0.1 * other.norm()


@pytest.mark.parametrize("name", LOSSES)
def test_what_is_wrong_is_refused(name):
    hidden, weight, _ = inputs_of(**FEW, seed=0)
    ids, weights = entries_drawn(**FEW, seed=0)
    with pytest.raises(ValueError, match="tail=rest: choose scale or bucket"):
        LOSSES[name](hidden, weight, ids, weights, tail="rest")
    with pytest.raises(ValueError, match="do not fit weights"):
        LOSSES[name](hidden, weight, ids, weights[:, :2])
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="a temperature above 0"):
            LOSSES[name](hidden, weight, ids, weights, temperature=temperature)
    with pytest.raises(ValueError, match="choose forward_kl, reverse_kl or jsd"):
        Divergence("kl")


@pytest.mark.parametrize("kind", ["ranks", "spans"])
def test_only_distributions_have_a_divergence(kind):
    hidden, weight, bias = inputs_of(**FEW, seed=0)
    targets = targets_of(FORMS[kind], **FEW, seed=0)
    for chosen in (Divergence("jsd"), Divergence(temperature=2.0)):
        with pytest.raises(ValueError, match=f"targets of the kind {kind} have a distance of their own"):
            target_loss(hidden, Head(weight, bias), targets, FORMS[kind], 0.5, None, chosen)


def test_one_row_by_hand():
    """Two tokens of four in the support: p = (.4, .2, .3, .1), q = (.6, .3) with .1 for the others."""
    logits = torch.tensor([0.4, 0.2, 0.3, 0.1], dtype=torch.float64).log()
    entries = {0: 0.6, 1: 0.3}
    p, q = [0.4, 0.2, 0.4], [0.6, 0.3, 0.1]
    kl = lambda one, other: sum(a * math.log(a / b) for a, b in zip(one, other, strict=True))  # noqa: E731
    middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    wanted = {
        "forward_kl": kl(q, p) - sum(a * math.log(a) for a in q),
        "reverse_kl": kl(p, q),
        "jsd": (kl(p, middle) + kl(q, middle)) / 2,
    }
    ids, weights = torch.tensor([[0, 1]]), torch.tensor([[0.6, 0.3]], dtype=torch.float64)
    for name, value in wanted.items():
        found = LOSSES[name](logits[None], torch.eye(4, dtype=torch.float64), ids, weights, tail="bucket")
        assert float(found) == pytest.approx(value, rel=1e-12)
        assert float(divergence(Divergence(name), logits, entries, True)) == pytest.approx(value, rel=1e-12)
    conditional = LOSSES["reverse_kl"](logits[None], torch.eye(4, dtype=torch.float64), ids, weights)
    assert float(conditional) == pytest.approx(0, abs=1e-14)  # 2 : 1 on either side


def test_unused_entries_may_have_any_id():
    hidden, weight, bias = inputs_of(**FEW, seed=6)
    ids, weights = entries_drawn(**FEW, seed=6)
    other = torch.where(weights > 0, ids, (ids + 3) % 9)
    for loss in LOSSES.values():
        for tail in TAILS:
            one, same = (loss(hidden, Head(weight, bias), chosen, weights, tail=tail) for chosen in (ids, other))
            assert_same(one, same, (hidden, weight, bias))
    targets = Targets(torch.cat([ids[:, :1], other], 1), torch.cat([torch.ones(6, 1).double(), weights], 1))
    plain = Targets(torch.cat([ids[:, :1], ids], 1), targets.weights_RK)
    pair = [target_loss(hidden, Head(weight, bias), one, FORMS["bucket"], 0.2).loss for one in (targets, plain)]
    assert_same(*pair, (hidden, weight, bias))
