"""Every loss over every head: scaled, capped, biased, tied, padded, frozen, sharded, compiled; once differentiable."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from dense_losses import (
    FORMS,
    assert_close,
    assert_same,
    entries_drawn,
    gradients,
    inputs_of,
    is_certain,
    logits_of,
    on_support,
    stage1_loss,
    targets_of,
)
from forked import ended, fork
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from fusion.objective import head_loss
from fusion.objective.divergence import Divergence, forward_kl, jsd, reverse_kl
from fusion.objective.head import Head
from fusion.objective.products import LARGE
from fusion.objective.sparse_loss import sparse_cross_entropy
from fusion.objective.target_loss import target_loss

FEW = {"rows": 6, "hidden": 4, "vocab": 9, "entries": 3, "bias": True}
ON_SUPPORT = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jsd": jsd}
REMAINING = {f"stage 1, {name}": form for name, form in FORMS.items()}
LOSSES = ["cross-entropy", *(f"{name}, {tail}" for name in ON_SUPPORT for tail in ("scale", "bucket")), *REMAINING]


def both(name, shape, seed, chunk=None, temperature=2.0):
    """Our loss and the dense one, as functions of hidden states and head."""
    if name in REMAINING:
        form = REMAINING[name]
        targets = targets_of(form, **shape, seed=seed)
        ours = lambda hidden, head: target_loss(hidden, head, targets, form, 0.3, chunk).loss  # noqa: E731
        return ours, lambda hidden, head: stage1_loss(hidden, head, targets, form, 0.3)[0]
    ids, weights = entries_drawn(**shape, seed=seed)
    if name == "cross-entropy":
        ours = lambda hidden, head: sparse_cross_entropy(hidden, head, ids, weights, chunk_size=chunk)  # noqa: E731
        return ours, lambda hidden, head: on_support(Divergence(), hidden, head, ids, weights, False)
    chosen, _, tail = name.partition(", ")
    call = partial(ON_SUPPORT[chosen], temperature=temperature, tail=tail, chunk_size=chunk)
    given = Divergence(chosen, temperature)
    return (
        lambda hidden, head: call(hidden, head, ids, weights),
        lambda hidden, head: on_support(given, hidden, head, ids, weights, tail == "bucket"),
    )


shapes = st.fixed_dictionaries(
    {
        "rows": st.integers(0, 7),
        "hidden": st.integers(1, 5),
        "vocab": st.integers(2, 12),
        "entries": st.integers(0, 4),
        "bias": st.booleans(),
    }
)
heads = st.fixed_dictionaries(
    {"scale": st.sampled_from([1.0, 0.25, -3.0]), "softcap": st.sampled_from([None, 0.5, 5.0, 30.0])}
)


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=25)
@given(shape=shapes, head=heads, seed=st.integers(0, 10**6), chunk=st.sampled_from([None, 1, 2, 3]))
def test_scaled_and_capped_logits(name, shape, head, seed, chunk):
    inputs = inputs_of(**shape, seed=seed)
    chosen = Head(*inputs[1:], **head)
    if name == "stage 1, spans":
        assume(not is_certain(logits_of(inputs[0], chosen), targets_of(FORMS["spans"], **shape, seed=seed)))
    ours, dense = both(name, shape, seed, chunk)
    assert_same(ours(inputs[0], chosen), dense(inputs[0], chosen), inputs)


@pytest.mark.parametrize("name", LOSSES)
def test_blocks_that_are_smaller_than_a_chunk(name, monkeypatch):
    monkeypatch.setattr(head_loss, "CPU_BLOCK", 20)  # logits: two rows
    inputs = inputs_of(**FEW | {"rows": 9}, seed=3)
    head = Head(*inputs[1:], 0.5, 5.0)
    ours, dense = both(name, FEW | {"rows": 9}, 3, chunk=5)
    assert_same(ours(inputs[0], head), dense(inputs[0], head), inputs)


@pytest.mark.parametrize("vocab", [head_loss.TOKENS * 2, head_loss.TOKENS * 2 + 5])
def test_a_large_head_in_single_precision(vocab):
    """Its products are oneDNN's, in slices of the vocabulary; bfloat16 multiplies in its own dtype."""
    shape = {"rows": 12, "hidden": LARGE // head_loss.TOKENS // 2, "vocab": vocab, "entries": 3, "bias": True}
    assert shape["hidden"] * vocab >= LARGE
    exact = [(one.detach() / 8).requires_grad_() for one in inputs_of(**shape, seed=1)]
    ours, dense = both("cross-entropy", shape, 1, chunk=5)
    wanted = gradients(dense(exact[0], Head(*exact[1:])), exact)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        own = [one.detach().to(dtype).requires_grad_() for one in exact]
        for one, other in zip(gradients(ours(own[0], Head(*own[1:])), own), wanted, strict=True):
            assert (one.double() - other).norm() < tolerance * other.norm()


@pytest.mark.parametrize("name", LOSSES)
def test_a_tied_head_with_rows_that_the_tokeniser_does_not_know(name):
    """The embedding's gradient is the sum of both uses; ids stay below 9, the head has 12 rows."""
    _, table, bias = inputs_of(**FEW | {"vocab": 12}, seed=4)
    words = torch.tensor([0, 3, 3, 5, 1, 8])
    ours, dense = both(name, FEW, 4, chunk=2)
    found, wanted = (loss(table[words].tanh(), Head(table, bias, 0.7, 4.0)) for loss in (ours, dense))
    assert_same(found, wanted, (table, bias))
    if name == "cross-entropy":
        assert gradients(wanted, (table,))[0][9:].abs().min() > 0  # they are tokens for the model, too


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias", "weight and bias", "all"])
@pytest.mark.parametrize("name", LOSSES)
def test_what_is_frozen_gets_no_gradient_and_disturbs_none(name, frozen):
    inputs = dict(zip(("hidden", "weight", "bias"), inputs_of(**FEW, seed=5), strict=True))
    for key, one in inputs.items():
        one.requires_grad_(key not in frozen and frozen != "all")
    head = Head(inputs["weight"], inputs["bias"], 2.0, 5.0)
    ours, dense = both(name, FEW, 5, chunk=2)
    found, wanted = ours(inputs["hidden"], head), dense(inputs["hidden"], head)
    assert found.requires_grad == wanted.requires_grad == (frozen != "all")
    if frozen == "all":
        assert_close(found, wanted)
        return
    assert_same(found, wanted, inputs.values())
    ours(inputs["hidden"], head).backward()
    assert [one.grad is None for one in inputs.values()] == [not one.requires_grad for one in inputs.values()]


@pytest.mark.parametrize("name", LOSSES)
def test_no_loss_is_differentiable_twice(name):
    hidden, weight, bias = inputs_of(**FEW, seed=6)
    ours, _ = both(name, FEW, 6)
    with pytest.raises(RuntimeError, match=r"differentiable once; create_graph=True is not supported"):
        torch.autograd.grad(ours(hidden, Head(weight, bias)), [hidden], create_graph=True)


@pytest.mark.parametrize("name", LOSSES)
def test_a_kept_graph_gives_its_gradients_again(name):
    inputs = inputs_of(**FEW, seed=7)
    ours, dense = both(name, FEW, 7, chunk=2)
    head = Head(*inputs[1:], 0.5, 3.0)
    loss, wanted = ours(inputs[0], head), gradients(dense(inputs[0], head), inputs)
    for factor in (1.0, -2.0, 0.0):
        again = torch.autograd.grad(loss * factor, inputs, retain_graph=True)
        for one, other in zip(again, wanted, strict=True):
            assert_close(one, other * factor)


@pytest.mark.parametrize("name", LOSSES)
def test_without_gradients_there_is_the_value_alone(name):
    inputs = inputs_of(**FEW, seed=8)
    ours, dense = both(name, FEW, 8, chunk=2)
    with torch.no_grad():
        found = ours(inputs[0], Head(*inputs[1:]))
    assert not found.requires_grad
    assert_close(found, dense(inputs[0], Head(*inputs[1:])))


@pytest.mark.parametrize("name", ["cross-entropy", "jsd, bucket", "stage 1, spans"])
def test_in_a_compiled_model(name):
    """What is around the loss is compiled, the loss is called as it is."""
    inputs = inputs_of(**FEW, seed=9)
    ours, dense = both(name, FEW, 9, chunk=2)

    def step(hidden, weight, bias):
        return ours(torch.tanh(hidden * 2), Head(weight, bias, 0.5, 5.0)) * 3

    torch._dynamo.reset()
    found = torch.compile(step, backend="aot_eager")(*inputs)
    assert_same(found, dense(torch.tanh(inputs[0] * 2), Head(*inputs[1:], 0.5, 5.0)) * 3, inputs)


@pytest.mark.parametrize("name", LOSSES)
def test_mixed_precision_over_a_head_that_scales_and_caps(name):
    shape = FEW | {"rows": 40, "vocab": 30}
    exact = inputs_of(**shape, seed=10)
    ours, dense = both(name, shape, 10, chunk=7)
    wanted = dense(exact[0], Head(*exact[1:], 0.5, 4.0))
    single = [one.detach().float().requires_grad_() for one in exact]
    with torch.autocast("cpu", torch.bfloat16):
        found = ours(single[0], Head(*single[1:], 0.5, 4.0))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=0.03, atol=0)
    for one, other in zip(gradients(found, single), gradients(wanted, exact), strict=True):
        assert (one.double() - other).norm() < 0.1 * other.norm()


def test_capped_logits_do_not_saturate_into_a_wrong_gradient():
    """Far beyond the cap tanh is 1 and nothing moves; at the cap the slope is 1 - tanh(1)^2."""
    head = Head(torch.eye(2, dtype=torch.float64), None, 1.0, 2.0)
    hidden = torch.tensor([[2.0, 0.0], [500.0, 0.0]], dtype=torch.float64, requires_grad=True)
    ids, weights = torch.tensor([[1], [1]]), torch.ones(2, 1, dtype=torch.float64)
    loss = sparse_cross_entropy(hidden, head, ids, weights)
    slope = 1 - torch.tanh(torch.ones((), dtype=torch.float64)) ** 2
    share = logits_of(hidden[:1], head).softmax(-1)[0, 0]
    (gradient,) = gradients(loss, (hidden,))
    assert_close(gradient[0, 0], share * slope)
    assert float(gradient[1, 0]) == 0


def sharded(store, rank):
    """A process with rows of its own and a shard of the head; DDP would give it the whole one."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for name in ("cross-entropy", "jsd, bucket", "stage 1, spans"):
        inputs = [inputs_of(**FEW, seed=20 + number) for number in (0, 1)]
        weight, bias = inputs[0][1:]
        head = Head(*(distribute_tensor(one.detach(), mesh, [Shard(0)]).requires_grad_() for one in (weight, bias)))
        ours, _ = both(name, FEW, 20 + rank, chunk=2)
        ours(inputs[rank][0], head._replace(scale=0.5, softcap=5.0)).backward()
        rows = [both(name, FEW, 20 + number)[1](inputs[number][0], Head(weight, bias, 0.5, 5.0)) for number in (0, 1)]
        wanted = torch.autograd.grad(sum(rows), [inputs[rank][0], weight, bias])
        assert isinstance(head.weight_VH.grad, DTensor)
        assert head.weight_VH.grad.placements == (Shard(0),)
        gathered = [head.weight_VH.grad, head.bias_V.grad]
        found = [inputs[rank][0].grad, *(one.redistribute(placements=[Replicate()]).to_local() for one in gathered)]
        for one, other in zip(found, wanted, strict=True):
            assert_close(one, other)
    dist.destroy_process_group()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a process that has used a GPU cannot be forked")
def test_a_head_that_is_sharded_over_processes_gets_the_gradient_of_all_their_rows(tmp_path):
    children = [fork(partial(sharded, tmp_path / "store", rank)) for rank in (0, 1)]
    assert [ended(child) for child in children] == [0, 0]
