"""How far the model is from sparse targets: divergences between distributions on a row's support.

The student's logits z are divided by the temperature T, and the divergence is multiplied by T^2, so that its gradient
keeps its size (https://arxiv.org/abs/1503.02531). Targets are taken as they are: `teacher.temperature` softens them.

`scale` tail: the targets of a row are a distribution of their own. Forward KL measures it against the model's whole
distribution; reverse KL and JSD, infinite or blind where the target says nothing, compare both conditional on the
support.
`bucket` tail: all tokens outside the support are one token more on either side. Its target mass is what the row lacks
to 1, and in reverse KL and JSD at least `LEAST_TAIL` (else what the model has there would cost infinitely much).

Tensor legend: T rows, H hidden size, V vocabulary, K target entries per row, S compared entries: K, and the bucket.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from fusion.objective.head import Head
from fusion.objective.head_loss import Question, Seen, head_loss
from fusion.objective.sparse_loss import tail_logprobs

LEAST_TAIL = 1e-6
"""Least target mass of the bucket in reverse KL and JSD."""


@dataclass(frozen=True)
class Divergence:
    name: str = "forward_kl"
    """forward_kl, reverse_kl or jsd."""
    temperature: float = 1.0
    """Of the student's logits."""

    def __post_init__(self) -> None:
        if self.name not in ("forward_kl", *_APART) or not self.temperature > 0:
            raise ValueError(f"{self}: choose forward_kl, reverse_kl or jsd, and a temperature above 0")


@dataclass(frozen=True)
class SparseTargets:
    """Target distributions on the support of every row; an id may repeat, its weights then add up."""

    ids_TK: Tensor
    """int64; where the weight is 0, any id."""
    weights_TK: Tensor
    """float, not differentiated; a row of zeros has no divergence."""
    has_bucket: bool

    @property
    def support_TK(self) -> Tensor:
        return self.weights_TK > 0

    @property
    def tail_T(self) -> Tensor:
        """What the entries of a row lack to 1; a row without entries lacks nothing."""
        return torch.where(self.support_TK.any(-1), (1 - self.weights_TK.sum(-1)).clamp(min=0), 0)

    def merged(self) -> "SparseTargets":
        """Every id of the support once per row, with all of its weight."""
        ids_TK, order_TK = torch.where(self.support_TK, self.ids_TK, -1).sort(-1)
        weights_TK = self.weights_TK.gather(-1, order_TK)
        starts_TK = ids_TK[:, 1:] != ids_TK[:, :-1]
        place_TK = pad(starts_TK.cumsum(-1), (1, 0)) if ids_TK.shape[1] else ids_TK
        summed_TK = torch.zeros_like(weights_TK).scatter_add_(-1, place_TK, weights_TK)
        unique_TK = torch.zeros_like(ids_TK).scatter_(-1, place_TK, ids_TK.clamp(min=0))
        return SparseTargets(unique_TK, summed_TK, self.has_bucket)

    def of(self, rows: slice) -> "SparseTargets":
        return SparseTargets(self.ids_TK[rows], self.weights_TK[rows], self.has_bucket)


def forward_kl(
    hidden_TH: Tensor,
    head_VH: Tensor | Head,
    ids_TK: Tensor,
    weights_TK: Tensor,
    *,
    temperature: float = 1.0,
    tail: str = "scale",
    chunk_size: int | None = None,
) -> Tensor:
    """T^2 * sum over rows of -sum_j w_j log p_T(j): forward KL but for the targets' entropy, which has no gradient.

    With `tail="bucket"`, all tokens outside a row's support are one more, with the weight that the row lacks to 1.
    Arguments, gradients and errors are those of `sparse_cross_entropy`.
    """
    return _on_support(Divergence("forward_kl", temperature), hidden_TH, head_VH, ids_TK, weights_TK, tail, chunk_size)


def reverse_kl(
    hidden_TH: Tensor,
    head_VH: Tensor | Head,
    ids_TK: Tensor,
    weights_TK: Tensor,
    *,
    temperature: float = 1.0,
    tail: str = "scale",
    chunk_size: int | None = None,
) -> Tensor:
    """T^2 * sum over rows of KL(model at T || target), in nats; https://arxiv.org/abs/2306.08543.

    With `tail="scale"` both are conditional on the row's support; with `tail="bucket"` all other tokens are one token
    more, to which the target gives what the row lacks to 1, at least 1e-6 (`LEAST_TAIL`). Arguments, gradients and
    errors are those of `sparse_cross_entropy`; weights are scaled to 1 per row.
    """
    return _on_support(Divergence("reverse_kl", temperature), hidden_TH, head_VH, ids_TK, weights_TK, tail, chunk_size)


def jsd(
    hidden_TH: Tensor,
    head_VH: Tensor | Head,
    ids_TK: Tensor,
    weights_TK: Tensor,
    *,
    temperature: float = 1.0,
    tail: str = "scale",
    chunk_size: int | None = None,
) -> Tensor:
    """T^2 * sum over rows of the Jensen-Shannon divergence of target and model at T, in nats: at most T^2 log 2 a row.

    It is the mean of KL(target || m) and KL(model || m), m their mean (the generalised JSD of
    https://arxiv.org/abs/2306.13649 at beta = 0.5). Support, tail (at least 1e-6 in the target's bucket), arguments
    and errors are those of `reverse_kl`.
    """
    return _on_support(Divergence("jsd", temperature), hidden_TH, head_VH, ids_TK, weights_TK, tail, chunk_size)


def _on_support(
    divergence: Divergence,
    hidden_TH: Tensor,
    head_VH: Tensor | Head,
    ids_TK: Tensor,
    weights_TK: Tensor,
    tail: str,
    chunk_size: int | None,
) -> Tensor:
    if weights_TK.shape != ids_TK.shape:
        raise ValueError(f"targets {tuple(ids_TK.shape)} do not fit weights {tuple(weights_TK.shape)}")
    if tail not in ("scale", "bucket"):
        raise ValueError(f"tail={tail}: choose scale or bucket")
    head = head_VH if isinstance(head_VH, Head) else Head(head_VH)
    targets = SparseTargets(ids_TK, weights_TK, tail == "bucket").merged()

    def row_loss(rows: slice, seen: Seen) -> list[Tensor]:
        return [divergence_sum(divergence, targets.of(rows), seen)]

    question = question_of(divergence, targets)
    return head_loss(hidden_TH, head, question, row_loss, chunk_size=chunk_size).loss


def question_of(divergence: Divergence, targets: SparseTargets) -> Question:
    """What `divergence_sum` wants to know of the head's logits."""
    is_conditional = not targets.has_bucket and divergence.name != "forward_kl"
    temperature = 1.0 if is_conditional else divergence.temperature  # no log-sum-exp of tempered logits is needed
    return Question(targets.ids_TK, targets.support_TK if targets.has_bucket else None, temperature)


def divergence_sum(divergence: Divergence, targets: SparseTargets, seen: Seen) -> Tensor:
    """T^2 * the divergence, summed over rows, in nats; a scalar. `targets` are merged, `seen` are the logits of their
    ids."""
    is_used_TS, own_TS = _logprobs(divergence, targets, seen)
    if divergence.name == "forward_kl":
        weights_TS = pad(targets.weights_TK, (0, 1))
        weights_TS[:, -1] = targets.tail_T if targets.has_bucket else 0
        total = -(weights_TS * own_TS).sum()
    else:
        target_TS = _target_logprobs(targets, is_used_TS).to(own_TS.dtype)
        total = torch.where(is_used_TS, _APART[divergence.name](target_TS, own_TS), 0).sum()
    return total * divergence.temperature**2


def _logprobs(divergence: Divergence, targets: SparseTargets, seen: Seen) -> tuple[Tensor, Tensor]:
    """Which entries are compared [T, S], and the model's log-probabilities there; 0 in the others."""
    support_TK, tempered_TK = targets.support_TK, seen.logits_TK / divergence.temperature
    exists_T = support_TK.any(-1) & (seen.outside_T1[:, 0] > -torch.inf) & targets.has_bucket
    is_used_TS = torch.column_stack([support_TK, exists_T])
    if targets.has_bucket or divergence.name == "forward_kl":
        own_TS = torch.column_stack([tempered_TK - seen.tempered_T1, tail_logprobs(seen)])
    else:
        own_TS = pad(_conditional(tempered_TK, support_TK), (0, 1))
    return is_used_TS, torch.where(is_used_TS, own_TS, 0)


def _conditional(logits_TK: Tensor, support_TK: Tensor) -> Tensor:
    """Log-probabilities on the support alone; a row without support has any finite ones."""
    masked_TK = torch.where(support_TK | ~support_TK.any(-1, keepdim=True), logits_TK, -torch.inf)
    return masked_TK.log_softmax(-1)


def _target_logprobs(targets: SparseTargets, is_used_TS: Tensor) -> Tensor:
    """Of the used entries, scaled to 1, the bucket's with a least mass; 0 in the others."""
    masses_TS = torch.column_stack([targets.weights_TK, targets.tail_T.clamp(min=LEAST_TAIL)]) * is_used_TS
    total_T1 = masses_TS.sum(-1, keepdim=True)
    return torch.where(is_used_TS, masses_TS, 1).log() - torch.where(is_used_TS, total_T1, 1).log()


def _reverse_kl(target_TS: Tensor, own_TS: Tensor) -> Tensor:
    """Terms of the sum over entries, of log-probabilities."""
    return own_TS.exp() * (own_TS - target_TS)


def _jsd(target_TS: Tensor, own_TS: Tensor) -> Tensor:
    middle_TS = torch.logaddexp(target_TS, own_TS) - math.log(2)
    return (target_TS.exp() * (target_TS - middle_TS) + own_TS.exp() * (own_TS - middle_TS)) / 2


_APART: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"reverse_kl": _reverse_kl, "jsd": _jsd}
FORWARD_KL = Divergence()
