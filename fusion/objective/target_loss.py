"""The loss of stage 1: `ce_weight * CE(reference) + (1 - ce_weight) * D(target, model)`, D by the kind of the targets.

- Tokens scaled to 1: D is the cross-entropy (the gradient of forward KL).
- Tokens with a tail bucket: the same, with all tokens outside the row's support as one token more.
- Ranks (ULD, https://arxiv.org/abs/2402.12030): D is the L1 distance of the sorted probabilities; what lies behind the
  row's last rank is one bucket on either side.
- Spans (ALM, https://arxiv.org/abs/2503.20083): D is temperature * KL(Bernoulli(teacher) || Bernoulli(model)) of the
  likelihoods of the span's text to the power 1 / temperature, once per span. The factor undoes the temperature's
  shrinking of the gradient, so that D has the order of the span's nats, as the reference's cross-entropy has.

Tensor legend: R rows, H hidden size, V vocabulary, K target entries per row, column 0 the reference; P ranks.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from fusion.alignment.target_kind import DISTRIBUTION, RANKS
from fusion.objective.divergence import FORWARD_KL, Divergence, SparseTargets, divergence_sum, question_of
from fusion.objective.head import Head
from fusion.objective.head_loss import Question, Seen, head_loss
from fusion.objective.sparse_loss import Tail, sparse_loss
from fusion.objective.target_form import TargetForm

__all__ = ["Head", "TargetLoss", "Targets", "bernoulli_divergence", "target_loss"]


class Targets(NamedTuple):
    """Sparse targets of rows."""

    ids_RK: Tensor
    """int64: column 0 is the reference token; the others are what `TargetKind` says. Spans: the id is the place, in
    this tensor, of the first row of the span."""
    weights_RK: Tensor
    """float, not differentiated: column 0 is 1 (0: the row does not count); the others are 0 where unused."""


class TargetLoss(NamedTuple):
    """Sums over rows, in nats, but for the distance of ranks, which is a probability."""

    loss: Tensor
    """Scalar, differentiable once with respect to hidden, weight and bias."""
    ce: Tensor
    """Cross-entropy of the references; detached."""
    fusion: Tensor
    """D; detached."""


def target_loss(
    hidden_RH: Tensor,
    head: Head,
    targets: Targets,
    form: TargetForm,
    ce_weight: float,
    chunk_size: int | None = None,
    divergence: Divergence = FORWARD_KL,
) -> TargetLoss:
    """The loss summed over rows; a row without fused entries has no D. `chunk_size` rows have logits at once.

    The references' cross-entropy is always that of the model at temperature 1.

    Raises:
        ValueError: shapes do not fit, or ranks and spans meet a divergence, which only distributions have.
    """
    if form.kind.name == DISTRIBUTION and divergence == FORWARD_KL:
        return _cross_entropy(hidden_RH, head, targets, form, ce_weight, chunk_size)
    distance = _distance(targets, form, divergence)

    def ce(rows: slice, seen: Seen) -> Tensor:
        return -(targets.weights_RK[rows, 0] * (seen.logits_TK - seen.normaliser_T1)[:, 0]).sum()

    def row_loss(rows: slice, seen: Seen) -> list[Tensor]:
        return [ce_weight * ce(rows, seen), (1 - ce_weight) * distance.of(rows, seen)]

    loss, seen = head_loss(
        hidden_RH, head, distance.question, row_loss, joins_rows=distance.joins_rows, chunk_size=chunk_size
    )
    every_row = slice(0, len(hidden_RH))
    return TargetLoss(loss, ce(every_row, seen), distance.of(every_row, seen))


def _cross_entropy(
    hidden_RH: Tensor, head: Head, targets: Targets, form: TargetForm, ce_weight: float, chunk_size: int | None
) -> TargetLoss:
    """Reference and target as one sparse distribution: one cross-entropy is all."""
    ids_RK, weights_RK = targets
    share_1K = torch.full_like(weights_RK[:1], 1 - ce_weight)
    share_1K[:, :1] = ce_weight
    tail = _tail(targets) if form.has_tail_bucket else None
    shared_tail = None if tail is None else tail._replace(weights_T=(1 - ce_weight) * tail.weights_T)
    found = sparse_loss(hidden_RH, head, ids_RK, weights_RK * share_1K, tail=shared_tail, chunk_size=chunk_size)
    parts_RK = weights_RK * found.logprobs_TK
    fusion = -parts_RK[:, 1:].sum()
    if tail is not None:
        fusion -= (tail.weights_T * found.tail_logprobs_T).sum()
    return TargetLoss(found.loss, -parts_RK[:, 0].sum(), fusion)


def _tail(targets: Targets) -> Tail:
    fused = SparseTargets(targets.ids_RK[:, 1:], targets.weights_RK[:, 1:], has_bucket=True)
    return Tail(fused.tail_T, pad(fused.support_TK, (1, 0)))


class _Distance(NamedTuple):
    """A distance D that is no plain cross-entropy."""

    question: Question
    """Column 0 of its ids are the references."""
    of: Callable[[slice, Seen], Tensor]
    """D summed over the rows at these places."""
    joins_rows: bool = False


def _distance(targets: Targets, form: TargetForm, divergence: Divergence) -> _Distance:
    if form.kind.name == DISTRIBUTION:
        return _between_distributions(targets, form, divergence)
    if divergence != FORWARD_KL:
        raise ValueError(f"{divergence}: targets of the kind {form.kind.name} have a distance of their own")
    return _between_ranks(targets) if form.kind.name == RANKS else _between_spans(targets, form.kind.temperature)


def _between_distributions(targets: Targets, form: TargetForm, divergence: Divergence) -> _Distance:
    fused = SparseTargets(targets.ids_RK[:, 1:], targets.weights_RK[:, 1:], form.has_tail_bucket).merged()
    question = question_of(divergence, fused)
    support_RK = None if question.support_TK is None else pad(question.support_TK, (1, 0))
    ids_RK = torch.cat([targets.ids_RK[:, :1], fused.ids_TK], dim=1)

    def apart(rows: slice, seen: Seen) -> Tensor:
        return divergence_sum(divergence, fused.of(rows), seen._replace(logits_TK=seen.logits_TK[:, 1:]))

    return _Distance(question._replace(ids_TK=ids_RK, support_TK=support_RK), apart)


def _between_ranks(targets: Targets) -> _Distance:
    wanted_RP, depth_R1 = _by_rank(targets)
    ranks_P = torch.arange(wanted_RP.shape[1], device=wanted_RP.device)

    def apart(rows: slice, seen: Seen) -> Tensor:
        likely_RP = (seen.likely_TP - seen.normaliser_T1).exp()
        found_RP = pad(likely_RP, (0, len(ranks_P) - likely_RP.shape[1])) * (ranks_P < depth_R1[rows])
        missed_R = (wanted_RP[rows].sum(-1) - found_RP.sum(-1)).abs()
        return ((wanted_RP[rows] - found_RP).abs().sum(-1) + missed_R).sum()

    return _Distance(Question(targets.ids_RK[:, :1], most_likely=len(ranks_P)), apart)


def _by_rank(targets: Targets) -> tuple[Tensor, Tensor]:
    """Probabilities by rank [R, P], and how many ranks every row speaks of, int64 [R, 1]: the last one that it has."""
    ranks_RK, weights_RK = targets.ids_RK[:, 1:], targets.weights_RK[:, 1:]
    depths_RK = torch.where(weights_RK > 0, ranks_RK + 1, 0)
    depth_R1 = pad(depths_RK, (0, 1)).amax(-1, keepdim=True)
    ranks = int(depth_R1.amax()) if len(depth_R1) else 0
    wanted_RP = weights_RK.new_zeros(len(ranks_RK), max(ranks, 1))
    return wanted_RP.scatter_add(-1, torch.where(weights_RK > 0, ranks_RK, 0), weights_RK), depth_R1


def _between_spans(targets: Targets, temperature: float) -> _Distance:
    # A span is known by its first row, so sums over spans are sums over rows, at the place of the first one.
    row_E, column_E = (targets.weights_RK[:, 1:] > 0).nonzero(as_tuple=True)
    span_E, weights_E = targets.ids_RK[row_E, column_E + 1], targets.weights_RK[row_E, column_E + 1]
    likelihood_R = weights_E.new_zeros(len(targets.ids_RK))
    likelihood_R[span_E] = weights_E  # all rows of a span have the same
    starts_S = (likelihood_R > 0).nonzero()[:, 0]

    def apart(rows: slice, seen: Seen) -> Tensor:
        logprobs_R = (seen.logits_TK - seen.normaliser_T1)[:, 0]
        summed_R = torch.zeros_like(logprobs_R).index_put((span_E,), logprobs_R[row_E], accumulate=True)
        teacher_S = likelihood_R[starts_S].to(logprobs_R.dtype)
        return bernoulli_divergence(teacher_S, summed_R[starts_S], temperature).sum()

    return _Distance(Question(targets.ids_RK[:, :1]), apart, joins_rows=True)


def bernoulli_divergence(teacher_S: Tensor, logprobs_S: Tensor, temperature: float) -> Tensor:
    """temperature * KL(Bernoulli(teacher) || Bernoulli(exp(logprobs / temperature))) per span, in nats: [S].

    `teacher_S` are likelihoods to the power 1 / temperature, `logprobs_S` the model's log-likelihoods. Where the model
    is certain, its chance of another text is what the precision can tell from none.
    """
    own_S = logprobs_S.clamp(max=-torch.finfo(logprobs_S.dtype).eps) / temperature
    other_S = _log_one_minus_exp(own_S)
    entropy_S = torch.xlogy(teacher_S, teacher_S) + torch.xlogy(1 - teacher_S, 1 - teacher_S)
    return temperature * (entropy_S - teacher_S * own_S - (1 - teacher_S) * other_S)


def _log_one_minus_exp(logs: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, exact near 0 and far below it (Maechler 2012).

    Each branch sees only its own arguments: the gradient of the other one may be infinite there.
    """
    near = logs > -0.6931471805599453
    small, large = torch.where(near, logs, -1.0), torch.where(near, -1.0, logs)
    return torch.where(near, (-torch.expm1(small)).log(), torch.log1p(-large.exp()))
