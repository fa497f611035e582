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

from fusion.alignment.target_kind import DISTRIBUTION, RANKS, SPANS
from fusion.objective.chosen_logprobs import chosen_logprobs
from fusion.objective.sparse_loss import Tail, sparse_loss
from fusion.objective.target_form import TargetForm


class Head(NamedTuple):
    """The model's output head."""

    weight_VH: Tensor
    bias_V: Tensor | None = None


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
) -> TargetLoss:
    """The loss summed over rows; a row without fused entries has no D. `chunk_size` rows have logits at once."""
    return _LOSSES[form.kind.name](hidden_RH, head, targets, form, ce_weight, chunk_size)


def _token_loss(
    hidden_RH: Tensor, head: Head, targets: Targets, form: TargetForm, ce_weight: float, chunk_size: int | None
) -> TargetLoss:
    ids_RK, weights_RK = targets
    share_1K = torch.full_like(weights_RK[:1], 1 - ce_weight)
    share_1K[:, :1] = ce_weight
    tail = _tail(weights_RK) if form.has_tail_bucket else None
    shared_tail = None if tail is None else tail._replace(weights_T=(1 - ce_weight) * tail.weights_T)
    found = sparse_loss(
        hidden_RH,
        head.weight_VH,
        ids_RK,
        weights_RK * share_1K,
        bias_V=head.bias_V,
        tail=shared_tail,
        chunk_size=chunk_size,
    )
    parts_RK = weights_RK * found.logprobs_TK
    fusion = -parts_RK[:, 1:].sum()
    if tail is not None:
        fusion -= (tail.weights_T * found.tail_logprobs_T).sum()
    return TargetLoss(found.loss, -parts_RK[:, 0].sum(), fusion)


def _tail(weights_RK: Tensor) -> Tail:
    """What the fused entries of a row lack to 1; a row without entries lacks nothing."""
    support_RK = weights_RK > 0
    support_RK[:, 0] = False
    lacking_R = (1 - weights_RK[:, 1:].sum(-1)).clamp(min=0)
    return Tail(torch.where(support_RK.any(-1), lacking_R, 0), support_RK)


def _rank_loss(
    hidden_RH: Tensor, head: Head, targets: Targets, form: TargetForm, ce_weight: float, chunk_size: int | None
) -> TargetLoss:
    wanted_RP, depth_R1 = _by_rank(targets)
    references_R1 = targets.ids_RK[:, :1]
    logprobs_R1, likely_RP = chosen_logprobs(
        hidden_RH,
        head.weight_VH,
        references_R1,
        most_likely=wanted_RP.shape[1],
        bias_V=head.bias_V,
        chunk_size=chunk_size,
    )
    found_RP = pad(likely_RP.exp(), (0, wanted_RP.shape[1] - likely_RP.shape[1]))
    found_RP = found_RP * (torch.arange(wanted_RP.shape[1], device=depth_R1.device) < depth_R1)
    apart_R = (wanted_RP - found_RP).abs().sum(-1) + (wanted_RP.sum(-1) - found_RP.sum(-1)).abs()
    return _together(targets, logprobs_R1[:, 0], apart_R.sum(), ce_weight)


def _by_rank(targets: Targets) -> tuple[Tensor, Tensor]:
    """Probabilities by rank [R, P], and how many ranks every row speaks of, int64 [R, 1]: the last one that it has."""
    ranks_RK, weights_RK = targets.ids_RK[:, 1:], targets.weights_RK[:, 1:]
    depths_RK = torch.where(weights_RK > 0, ranks_RK + 1, 0)
    depth_R1 = pad(depths_RK, (0, 1)).amax(-1, keepdim=True)
    ranks = int(depth_R1.amax()) if len(depth_R1) else 0
    wanted_RP = weights_RK.new_zeros(len(ranks_RK), max(ranks, 1))
    return wanted_RP.scatter_add(-1, torch.where(weights_RK > 0, ranks_RK, 0), weights_RK), depth_R1


def _span_loss(
    hidden_RH: Tensor, head: Head, targets: Targets, form: TargetForm, ce_weight: float, chunk_size: int | None
) -> TargetLoss:
    logprobs_R1, _ = chosen_logprobs(
        hidden_RH, head.weight_VH, targets.ids_RK[:, :1], bias_V=head.bias_V, chunk_size=chunk_size
    )
    logprobs_R = logprobs_R1[:, 0]
    # A span is known by its first row, so sums over spans are sums over rows, at the place of the first one.
    row_E, column_E = (targets.weights_RK[:, 1:] > 0).nonzero(as_tuple=True)
    span_E, weights_E = targets.ids_RK[row_E, column_E + 1], targets.weights_RK[row_E, column_E + 1]
    summed_R = torch.zeros_like(logprobs_R).index_put((span_E,), logprobs_R[row_E], accumulate=True)
    likelihood_R = torch.zeros_like(logprobs_R)
    likelihood_R[span_E] = weights_E.to(logprobs_R.dtype)  # all rows of a span have the same
    starts_S = (likelihood_R > 0).nonzero()[:, 0]
    fusion = bernoulli_divergence(likelihood_R[starts_S], summed_R[starts_S], form.kind.temperature).sum()
    return _together(targets, logprobs_R, fusion, ce_weight)


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


def _together(targets: Targets, logprobs_R: Tensor, fusion: Tensor, ce_weight: float) -> TargetLoss:
    ce = -(targets.weights_RK[:, 0] * logprobs_R).sum()
    return TargetLoss(ce_weight * ce + (1 - ce_weight) * fusion, ce.detach(), fusion.detach())


_LOSSES: dict[str, Callable[[Tensor, Head, Targets, TargetForm, float, int | None], TargetLoss]] = {
    DISTRIBUTION: _token_loss,
    RANKS: _rank_loss,
    SPANS: _span_loss,
}
