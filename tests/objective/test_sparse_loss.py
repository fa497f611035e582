"""The sparse cross-entropy equals a dense one: value, all gradients, whatever the chunks, shapes and repeats."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion.objective import sparse_cross_entropy
from fusion.objective.head import Head
from fusion.objective.head_loss import rows_per_chunk
from fusion.objective.sparse_loss import sparse_loss

shapes = st.fixed_dictionaries(
    {
        "rows": st.integers(0, 9),
        "hidden": st.integers(1, 7),
        "vocab": st.integers(1, 12),
        "entries": st.integers(0, 5),
        "seed": st.integers(0, 10**6),
        "bias": st.booleans(),
        "chunk": st.sampled_from([None, 1, 2, 3, 8, 100]),
        "scale": st.sampled_from([0.1, 1.0, 30.0]),
    }
)


def problem(rows, hidden, vocab, entries, seed, bias, scale=1.0, dtype=torch.float64, **_):
    """Random inputs with repeated ids, entries of weight zero, and (row 0) a row without any weight."""
    draw = torch.Generator().manual_seed(seed)
    weights = torch.rand(rows, entries, generator=draw, dtype=dtype)
    weights = weights * (torch.rand(rows, entries, generator=draw) > 0.3)
    if rows > 1:
        weights[0] = 0
    return (
        (torch.randn(rows, hidden, generator=draw, dtype=dtype) * scale).requires_grad_(),
        torch.randn(vocab, hidden, generator=draw, dtype=dtype).requires_grad_(),
        torch.randint(0, vocab, (rows, entries), generator=draw),
        weights,
        torch.randn(vocab, generator=draw, dtype=dtype).requires_grad_() if bias else None,
    )


def dense(hidden, head, ids, weights, bias):
    logprobs = torch.nn.functional.linear(hidden, head, bias).log_softmax(-1)
    targets = torch.zeros_like(logprobs).scatter_add(-1, ids, weights)
    return -(targets * logprobs).sum()


def gradients(loss, inputs):
    return torch.autograd.grad(loss, [one for one in inputs if one is not None])


def largest(gradient):
    return gradient.abs().max() if gradient.numel() else 0.0


@settings(max_examples=150)
@given(shapes)
def test_value_and_gradients_equal_the_dense_formula(shape):
    hidden, head, ids, weights, bias = problem(**shape)
    loss = sparse_cross_entropy(hidden, head, ids, weights, bias_V=bias, chunk_size=shape["chunk"])
    expected = dense(hidden, head, ids, weights, bias)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    assert loss.shape == ()
    assert loss.dtype == torch.float64
    inputs = (hidden, head, bias)
    for found, wanted in zip(gradients(loss * 0.7, inputs), gradients(expected * 0.7, inputs), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12 * max(1.0, float(largest(wanted))))


def test_gradcheck():
    hidden, head, ids, weights, bias = problem(5, 4, 6, 3, seed=0, bias=True)
    function = lambda *inputs: sparse_cross_entropy(*inputs[:2], ids, weights, bias_V=inputs[2], chunk_size=2)  # noqa: E731
    assert torch.autograd.gradcheck(function, (hidden, head, bias))


def test_a_mixture_of_reference_and_distribution_is_the_papers_loss():
    hidden, head, ids, _, _ = problem(6, 4, 9, 3, seed=1, bias=False)
    gold = torch.randint(0, 9, (6,), generator=torch.Generator().manual_seed(2))
    fused = torch.rand(6, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    fused /= fused.sum(-1, keepdim=True)
    columns = torch.column_stack([gold, ids])
    weights = torch.column_stack([torch.full((6,), 0.9, dtype=torch.float64), 0.1 * fused])
    logprobs = (hidden @ head.T).log_softmax(-1)
    soft = -(fused * logprobs.gather(-1, ids)).sum()
    expected = 0.9 * torch.nn.functional.nll_loss(logprobs, gold, reduction="sum") + 0.1 * soft
    torch.testing.assert_close(sparse_cross_entropy(hidden, head, columns, weights), expected, rtol=1e-12, atol=0)


def test_log_probabilities_are_reported_and_detached():
    hidden, head, ids, weights, bias = problem(7, 4, 6, 3, seed=3, bias=True)
    _, logprobs, _ = sparse_loss(hidden, Head(head, bias), ids, weights, chunk_size=3)
    expected = torch.nn.functional.linear(hidden, head, bias).log_softmax(-1).gather(-1, ids)
    torch.testing.assert_close(logprobs, expected.detach(), rtol=1e-12, atol=1e-12)
    assert not logprobs.requires_grad


def test_a_head_that_is_also_the_embedding_gets_both_gradients():
    _, table, ids, weights, _ = problem(5, 4, 6, 3, seed=4, bias=False)
    words = torch.tensor([0, 3, 3, 5, 1])

    def gradient(loss):
        (found,) = torch.autograd.grad(loss(table[words].tanh(), table, ids, weights, None), [table])
        return found

    tied = gradient(
        lambda hidden, head, ids, weights, _: sparse_cross_entropy(hidden, head, ids, weights, chunk_size=2)
    )
    torch.testing.assert_close(tied, gradient(dense), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen", ["hidden", "head", "bias", "all"])
def test_frozen_inputs_get_no_gradient_and_disturb_none(frozen):
    names = ("hidden", "head", "bias")
    hidden, head, ids, weights, bias = problem(5, 4, 6, 3, seed=5, bias=True)
    full = dict(zip(names, gradients(dense(hidden, head, ids, weights, bias), (hidden, head, bias)), strict=True))
    inputs = {"hidden": hidden, "head": head, "bias": bias}
    for name in names if frozen == "all" else (frozen,):
        inputs[name].requires_grad_(False)
    loss = sparse_cross_entropy(inputs["hidden"], inputs["head"], ids, weights, bias_V=inputs["bias"], chunk_size=2)
    assert loss.requires_grad == (frozen != "all")
    if frozen != "all":
        loss.backward()
    for name in names:
        if name == frozen or frozen == "all":
            assert inputs[name].grad is None
        else:
            torch.testing.assert_close(inputs[name].grad, full[name], rtol=1e-12, atol=1e-12)


def test_a_second_derivative_is_refused_not_wrong():
    hidden, head, ids, weights, _ = problem(3, 4, 6, 3, seed=6, bias=False)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(sparse_cross_entropy(hidden, head, ids, weights), [hidden], create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_inputs_are_summed_in_float32(dtype):
    hidden, head, ids, weights, bias = problem(50, 8, 40, 3, seed=7, bias=True, dtype=torch.float32)
    low = [one.detach().to(dtype).requires_grad_() for one in (hidden, head, bias)]
    loss = sparse_cross_entropy(low[0], low[1], ids, weights, bias_V=low[2], chunk_size=7)
    assert loss.dtype == torch.float32
    expected = dense(low[0].double(), low[1].double(), ids, weights.double(), low[2].double())
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=0)
    exact = torch.autograd.grad(expected, low)
    for found, wanted in zip(torch.autograd.grad(loss, low), exact, strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found, wanted, rtol=tolerance * 5, atol=tolerance * float(wanted.abs().max()))


def test_under_autocast_as_lightnings_mixed_precision():
    hidden, head, ids, weights, bias = problem(20, 8, 40, 3, seed=8, bias=True, dtype=torch.float32)
    exact = gradients(dense(hidden, head, ids, weights, bias), (hidden, head, bias))
    with torch.autocast("cpu", torch.bfloat16):
        loss = sparse_cross_entropy(hidden.bfloat16(), head, ids, weights, bias_V=bias, chunk_size=6)
    assert loss.dtype == torch.float32
    for found, wanted in zip(gradients(loss, (hidden, head, bias)), exact, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, wanted, rtol=0.1, atol=0.05 * float(wanted.abs().max()))


def test_huge_logits_stay_finite():
    hidden, head, ids, weights, _ = problem(4, 4, 6, 3, seed=9, bias=False, scale=1e4, dtype=torch.float32)
    loss = sparse_cross_entropy(hidden, head, ids, weights)
    assert torch.isfinite(loss)
    assert all(torch.isfinite(one).all() for one in gradients(loss, (hidden, head)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"head": (6, 5)}, "do not fit each other"),
        ({"hidden": (3, 4, 1)}, "do not fit each other"),
        ({"ids": (3, 2)}, "do not fit weights"),
        ({"ids": (2, 3), "weights": (2, 3)}, "do not fit 3 rows"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, said):
    sizes = {"hidden": (3, 4), "head": (6, 4), "ids": (3, 3), "weights": (3, 3)} | change
    tensors = {
        name: torch.zeros(size, dtype=torch.int64 if name == "ids" else torch.float32) for name, size in sizes.items()
    }
    with pytest.raises(ValueError, match=said):
        sparse_cross_entropy(*tensors.values())


def test_a_chunk_is_never_tiny():
    assert rows_per_chunk(10**9, torch.device("cpu")) == 8
    assert rows_per_chunk(1000, torch.device("cpu")) == (1 << 22) // 1000
    assert rows_per_chunk(1000, torch.device("cuda")) > rows_per_chunk(1000, torch.device("cpu"))
