"""Cross-entropy against sparse targets, without targets or logits of the size [tokens, vocabulary].

With logits z = h W^T (+ b), a row with sparse weights w costs  m * logsumexp(z) - sum_j w_j z_j,  m = sum_j w_j, and
its gradient is  dz = m * softmax(z) - scatter(w).  A mixture lambda * onehot(y) + (1 - lambda) * q is just one such w.
A tail bucket is one entry more: all tokens outside the row's support together, with the logit logsumexp(z outside);
its share of the gradient falls on these tokens as their own softmax.

Tensor legend: T rows, H hidden size, V vocabulary, K target entries per row.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

CPU_CHUNK, GPU_CHUNK = 1 << 22, 1 << 27
"""Logits of one chunk."""


class Tail(NamedTuple):
    """The bucket of all tokens outside a row's support."""

    weights_T: Tensor
    """float: the bucket's target weight, 0 in rows without a bucket; ignored where the support is the vocabulary."""
    support_TK: Tensor
    """bool: the entries whose ids are the row's support."""


class SparseLoss(NamedTuple):
    loss: Tensor
    """Scalar, differentiable once."""
    logprobs_TK: Tensor
    """Log-probabilities of the target ids; detached, for reports."""
    tail_logprobs_T: Tensor
    """Log-probability of the tail bucket; detached, 0 where there is no such bucket."""


def sparse_cross_entropy(
    hidden_TH: Tensor,
    head_VH: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    *,
    bias_V: Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Sum over rows of the cross-entropy between sparse targets and softmax(hidden @ head.T + bias), in nats.

    Args:
        hidden_TH: hidden states of the supervised rows.
        head_VH: weight of the output head.
        ids_TK: int64 target ids; an id may repeat in a row, its weights then add up. Unused columns: any id, weight 0.
        weights_TK: float target weights, not differentiated; rows need not sum to 1.
        bias_V: bias of the output head.
        chunk_size: rows whose logits exist at the same time; None takes what `rows_per_chunk` gives.

    Returns a scalar (float32, or float64 for float64 input) that is differentiable once, with respect to hidden, head
    and bias; the gradients are computed in the forward pass, so that logits never wait for the backward pass.
    """
    return sparse_loss(hidden_TH, head_VH, ids_TK, weights_TK, bias_V=bias_V, chunk_size=chunk_size).loss


def sparse_loss(
    hidden_TH: Tensor,
    head_VH: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    *,
    bias_V: Tensor | None = None,
    tail: Tail | None = None,
    chunk_size: int | None = None,
) -> SparseLoss:
    """`sparse_cross_entropy`, with a `tail` bucket where there is one, and what reports want to know."""
    require_fit(hidden_TH, head_VH, ids_TK)
    shapes = [weights_TK.shape, *([tail.support_TK.shape] if tail is not None else [])]
    if any(shape != ids_TK.shape for shape in shapes):
        raise ValueError(f"targets {tuple(ids_TK.shape)} do not fit weights or support {[*map(tuple, shapes)]}")
    chunk = chunk_size or rows_per_chunk(len(head_VH), hidden_TH.device)
    return SparseLoss(*_SparseCrossEntropy.apply(hidden_TH, head_VH, bias_V, ids_TK, weights_TK, tail, chunk))


def require_fit(hidden_TH: Tensor, head_VH: Tensor, ids_TK: Tensor) -> None:
    """Raises ValueError for shapes that do not belong together."""
    if hidden_TH.ndim != 2 or head_VH.ndim != 2 or hidden_TH.shape[1] != head_VH.shape[1]:
        raise ValueError(f"hidden {tuple(hidden_TH.shape)} and head {tuple(head_VH.shape)} do not fit each other")
    if ids_TK.ndim != 2 or len(ids_TK) != len(hidden_TH):
        raise ValueError(f"targets {tuple(ids_TK.shape)} do not fit {len(hidden_TH)} rows")


def rows_per_chunk(vocab_size: int, device: torch.device) -> int:
    """Rows whose logits fill a chunk: few on a CPU, where fresh memory costs, many on a GPU, where launches cost."""
    return max(8, (CPU_CHUNK if device.type == "cpu" else GPU_CHUNK) // vocab_size)


class _SparseCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        head_VH: Tensor,
        bias_V: Tensor | None,
        ids_TK: Tensor,
        weights_TK: Tensor,
        tail: Tail | None,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        exact = torch.promote_types(hidden_TH.dtype, torch.float32)
        needs_hidden, needs_head, needs_bias = ctx.needs_input_grad[:3]
        loss = hidden_TH.new_zeros((), dtype=exact)
        logprobs = hidden_TH.new_empty(ids_TK.shape, dtype=exact)
        tail_logprobs = hidden_TH.new_zeros(len(ids_TK), dtype=exact)
        hidden_grad = torch.empty_like(hidden_TH) if needs_hidden else None
        head_grad = torch.zeros_like(head_VH, dtype=exact) if needs_head else None
        bias_grad = torch.zeros_like(bias_V, dtype=exact) if needs_bias and bias_V is not None else None
        for start in range(0, len(hidden_TH), chunk_size):
            rows = slice(start, start + chunk_size)
            hidden, ids, weights = hidden_TH[rows], ids_TK[rows], weights_TK[rows].to(exact)
            logits = (hidden @ head_VH.T).to(exact)
            if bias_V is not None:
                logits += bias_V
            normaliser = logits.logsumexp(-1, keepdim=True)
            logprobs[rows] = logits.gather(-1, ids) - normaliser
            loss -= (weights * logprobs[rows]).sum()
            mass = weights.sum(-1, keepdim=True)
            bucket = None
            if tail is not None:
                bucket = _bucket(logits, normaliser, ids, tail.support_TK[rows], tail.weights_T[rows].to(exact))
                tail_logprobs[rows] = bucket.logprobs
                loss -= (bucket.weights * bucket.logprobs).sum()
                mass += bucket.weights[:, None]
            dlogits = logits.sub_(normaliser).exp_().mul_(mass).scatter_add_(-1, ids, -weights)
            if bucket is not None:
                dlogits -= bucket.pull
            if hidden_grad is not None:
                hidden_grad[rows] = dlogits.to(head_VH.dtype) @ head_VH
            if head_grad is not None:
                head_grad.addmm_(dlogits.T, hidden.to(exact))
            if bias_grad is not None:
                bias_grad += dlogits.sum(0)
        ctx.save_for_backward(hidden_grad, head_grad, bias_grad)
        ctx.head_dtype, ctx.bias_dtype = head_VH.dtype, bias_V.dtype if bias_V is not None else None
        ctx.mark_non_differentiable(logprobs, tail_logprobs)
        return loss, logprobs, tail_logprobs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # a graph of the gradient would take it for a constant
            raise RuntimeError("sparse_cross_entropy is differentiable once; create_graph=True is not supported")
        hidden_grad, head_grad, bias_grad = ctx.saved_tensors
        scale = grads[0]
        return (
            hidden_grad * scale.to(hidden_grad.dtype) if hidden_grad is not None else None,
            (head_grad * scale).to(ctx.head_dtype) if head_grad is not None else None,
            (bias_grad * scale).to(ctx.bias_dtype) if bias_grad is not None else None,
            *[None] * 4,
        )


class _Bucket(NamedTuple):
    weights: Tensor
    logprobs: Tensor
    pull: Tensor


def _bucket(logits: Tensor, normaliser: Tensor, ids: Tensor, support: Tensor, weights: Tensor) -> _Bucket:
    """The tail bucket of a chunk of rows; `pull` [rows, V] is its weight times the softmax over its own tokens.

    The sum runs over the bucket's own logits: log(1 - sum of the others) would cancel where the tail is small.
    """
    outside = logits.clone()
    row, column = support.nonzero(as_tuple=True)
    outside[row, ids[row, column]] = -torch.inf
    own = outside.logsumexp(-1)
    exists = own > -torch.inf
    weights = torch.where(exists, weights, 0)
    logprobs = torch.where(exists, own - normaliser[:, 0], 0)
    pull = outside.sub_(torch.where(exists, own, torch.inf)[:, None]).exp_().mul_(weights[:, None])
    return _Bucket(weights, logprobs, pull)
