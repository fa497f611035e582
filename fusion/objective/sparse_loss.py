"""Cross-entropy against sparse targets, without targets or logits of the size [tokens, vocabulary].

With logits z, a row with sparse weights w costs  m * logsumexp(z) - sum_j w_j z_j,  m = sum_j w_j, and its gradient is
dz = m * softmax(z) - scatter(w).  A mixture lambda * onehot(y) + (1 - lambda) * q is just one such w.
A tail bucket is one entry more: all tokens outside the row's support together, with the logit logsumexp(z outside);
its share of the gradient falls on these tokens as their own softmax.

Tensor legend: T rows, H hidden size, V vocabulary, K target entries per row.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fusion.objective.head import Head
from fusion.objective.head_loss import Question, Seen, head_loss


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
    head_VH: Tensor | Head,
    ids_TK: Tensor,
    weights_TK: Tensor,
    *,
    bias_V: Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Sum over rows of the cross-entropy between sparse targets and the softmax of the head's logits, in nats.

    Args:
        hidden_TH: hidden states of the supervised rows.
        head_VH: weight of the output head, or a `Head` that also has a bias, a scale or a soft cap.
        ids_TK: int64 target ids; an id may repeat in a row, its weights then add up. Unused columns: any id, weight 0.
        weights_TK: float target weights, not differentiated; rows need not sum to 1.
        bias_V: bias of a head that is given by its weight.
        chunk_size: rows whose logits exist at the same time; None takes what `rows_per_chunk` gives.

    Returns a scalar (float32, or float64 for float64 input) that is differentiable once, with respect to hidden, head
    and bias; the gradients are computed in the forward pass, so that logits never wait for the backward pass.

    Raises:
        ValueError: shapes do not fit.
    """
    head = head_VH if isinstance(head_VH, Head) else Head(head_VH, bias_V)
    return sparse_loss(hidden_TH, head, ids_TK, weights_TK, chunk_size=chunk_size).loss


def sparse_loss(
    hidden_TH: Tensor,
    head: Head,
    ids_TK: Tensor,
    weights_TK: Tensor,
    *,
    tail: Tail | None = None,
    chunk_size: int | None = None,
) -> SparseLoss:
    """`sparse_cross_entropy`, with a `tail` bucket where there is one, and what reports want to know."""
    shapes = [weights_TK.shape, *([tail.support_TK.shape] if tail is not None else [])]
    if any(shape != ids_TK.shape for shape in shapes):
        raise ValueError(f"targets {tuple(ids_TK.shape)} do not fit weights or support {[*map(tuple, shapes)]}")

    def row_loss(rows: slice, seen: Seen) -> list[Tensor]:
        terms = [-(weights_TK[rows] * (seen.logits_TK - seen.normaliser_T1)).sum()]
        if tail is not None:
            terms.append(-(tail.weights_T[rows] * tail_logprobs(seen)).sum())
        return terms

    question = Question(ids_TK, None if tail is None else tail.support_TK)
    loss, seen = head_loss(hidden_TH, head, question, row_loss, chunk_size=chunk_size)
    return SparseLoss(loss, seen.logits_TK - seen.normaliser_T1, tail_logprobs(seen))


def tail_logprobs(seen: Seen) -> Tensor:
    """Log-probabilities [T] of the tokens outside the support, tempered as asked; 0 where there are none."""
    exists_T1 = seen.outside_T1 > -torch.inf
    return torch.where(exists_T1, torch.where(exists_T1, seen.outside_T1, 0) - seen.tempered_T1, 0)[:, 0]
