"""The losses once more, from all logits and row by row, as their formulas are written down; and random problems.

Nothing here knows of chunks, of log-sum-exps or of gathered logits. Gradients are autograd's.
"""

import torch
from hypothesis import strategies as st
from torch.nn.functional import linear

from fusion.alignment.target_kind import TargetKind
from fusion.objective.divergence import LEAST_TAIL, Divergence
from fusion.objective.target_form import TargetForm
from fusion.objective.target_loss import Targets

torch.set_num_threads(1)  # forked processes do not inherit the others

FEW = {"rows": 6, "hidden": 4, "vocab": 9, "entries": 3, "bias": True}
shapes = st.fixed_dictionaries(
    {
        "rows": st.integers(0, 9),
        "hidden": st.integers(1, 6),
        "vocab": st.integers(1, 12),
        "entries": st.integers(0, 5),
        "seed": st.integers(0, 10**6),
        "bias": st.booleans(),
    }
)
chunks = st.sampled_from([None, 1, 2, 3, 100])
FORMS = {
    "scale": TargetForm(),
    "bucket": TargetForm(tail="bucket"),
    "ranks": TargetForm(TargetKind("ranks"), "bucket"),
    "spans": TargetForm(TargetKind("spans", 3.0)),
}


def logits_of(hidden, head):
    logits = linear(hidden, head.weight_VH, head.bias_V) * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def entries_of(ids, weights):
    """{token: weight} of one row; what a token has several times adds up."""
    entries = {}
    for token, weight in zip(ids.tolist(), weights.tolist(), strict=True):
        if weight > 0:
            entries[token] = entries.get(token, 0.0) + weight
    return entries


def divergence(given, logits_V, entries, has_bucket):
    """T^2 * the divergence of one row from {token: weight}; of forward KL without the targets' entropy."""
    logits_V = logits_V / given.temperature
    others = [token for token in range(len(logits_V)) if token not in entries]
    target = logits_V.new_tensor(list(entries.values()))
    parts = [logits_V[token] for token in entries]
    if has_bucket and others:
        tail = max(1 - float(target.sum()), 0.0)
        target = torch.cat(
            [target, target.new_tensor([tail if given.name == "forward_kl" else max(tail, LEAST_TAIL)])]
        )
        parts.append(logits_V[others].logsumexp(0))
    logprobs = torch.stack(parts)
    if given.name == "forward_kl":
        return -(given.temperature**2) * (target * (logprobs - logits_V.logsumexp(0))).sum()
    target, logprobs = target / target.sum(), logprobs.log_softmax(0)  # with a bucket, they have all of the mass
    if given.name == "reverse_kl":
        terms = logprobs.exp() * (logprobs - target.log())
    else:
        middle = ((target + logprobs.exp()) / 2).log()
        terms = (target * (target.log() - middle) + logprobs.exp() * (logprobs - middle)) / 2
    return given.temperature**2 * terms.sum()


def rank_distance(logprobs_V, entries):
    depth = max(entries) + 1
    ranked = logprobs_V.exp().sort(descending=True).values[:depth]
    ranked = torch.cat([ranked, ranked.new_zeros(depth - len(ranked))])
    wanted = torch.tensor([entries.get(rank, 0.0) for rank in range(depth)], dtype=torch.float64)
    return (wanted - ranked).abs().sum() + ((1 - wanted.sum()) - (1 - ranked.sum())).abs()


def span_distance(logprob, weight, temperature):
    own = (logprob / temperature).exp()
    parts = [(weight, own), (1 - weight, -torch.expm1(logprob / temperature))]
    return temperature * sum(p * (torch.as_tensor(p, dtype=q.dtype).log() - q.log()) for p, q in parts if p > 0)


def is_certain(logits, targets):
    """Whether the model is sure of a reference: spans compare 1 - p, which rounding spoils near 0."""
    references = logits.log_softmax(-1).gather(-1, targets.ids_RK[:, :1])
    return bool((references > -0.05).any())


def on_support(given, hidden, head, ids, weights, has_bucket):
    """`forward_kl`, `reverse_kl` or `jsd`."""
    logits = logits_of(hidden, head)
    rows = [(number, entries_of(*row)) for number, row in enumerate(zip(ids, weights, strict=True))]
    nothing = logits.sum() * 0
    return sum((divergence(given, logits[number], one, has_bucket) for number, one in rows if one), nothing)


def stage1_loss(hidden, head, targets, form, ce_weight, given=None):
    """Loss, cross-entropy of the references, and distance."""
    return stage1_loss_of_logits(logits_of(hidden, head), targets, form, ce_weight, given or Divergence())


def stage1_loss_of_logits(logits, targets, form, ce_weight, given):
    """The same, whoever computed the logits of the rows."""
    logprobs = logits.log_softmax(-1)
    ce = fusion = logits.sum() * 0
    spans = {}
    for row in range(len(logits)):
        gold = targets.ids_RK[row, 0]
        ce = ce - targets.weights_RK[row, 0] * logprobs[row, gold]
        entries = entries_of(targets.ids_RK[row, 1:], targets.weights_RK[row, 1:])
        if form.kind.name == "spans":
            for span, weight in entries.items():
                spans.setdefault(span, [weight, []])[1].append(logprobs[row, gold])
        elif entries and form.kind.name == "ranks":
            fusion = fusion + rank_distance(logprobs[row], entries)
        elif entries:
            fusion = fusion + divergence(given, logits[row], entries, form.tail == "bucket")
    for weight, parts in spans.values():
        fusion = fusion + span_distance(sum(parts), weight, form.kind.temperature)
    return ce_weight * ce + (1 - ce_weight) * fusion, ce, fusion


def inputs_of(rows, hidden, vocab, seed, bias=True, scale=1.0, dtype=torch.float64, **_):
    """Hidden states, the head's weight and its bias, all of them leaves."""
    draw = torch.Generator().manual_seed(seed)
    return (
        (torch.randn(rows, hidden, generator=draw, dtype=dtype) * scale).requires_grad_(),
        torch.randn(vocab, hidden, generator=draw, dtype=dtype).requires_grad_(),
        torch.randn(vocab, generator=draw, dtype=dtype).requires_grad_() if bias else None,
    )


def entries_drawn(rows, vocab, entries, seed, **_):
    """Ids and weights [rows, entries]: repeated ids, unused columns, empty rows, and rows that lack nothing to 1."""
    draw = torch.Generator().manual_seed(seed + 1)
    ids = torch.randint(0, vocab, (rows, entries), generator=draw)
    weights = torch.rand(rows, entries, generator=draw, dtype=torch.float64)
    weights = weights * (torch.rand(rows, entries, generator=draw) > 0.3)
    mass, fate = weights.sum(-1, keepdim=True), torch.rand(rows, 1, generator=draw)
    whole = weights / mass.clamp(min=1e-9)
    return ids, torch.where(fate < 0.1, 0, torch.where(fate < 0.3, whole, weights / mass.clamp(min=1)))


def targets_of(form, rows, vocab, entries, seed, **_):
    """References and fused entries: repeated ids, unused columns, empty rows, and rows that do not count."""
    draw = torch.Generator().manual_seed(seed + 1)
    kind = form.kind.name
    columns = min(entries, 1) if kind == "spans" else entries
    ids, weights = entries_drawn(rows, vocab, columns, seed)
    if kind == "ranks":
        ids = torch.randint(0, 2 * max(columns, 1), (rows, columns), generator=draw)  # ranks may exceed the vocabulary
    elif kind == "spans" and columns:
        starts = torch.rand(rows, generator=draw) > 0.5
        starts[:1] = True
        ids = torch.where(starts, torch.arange(rows), 0).cummax(0).values[:, None]
        weights = weights[ids[:, 0]]
    counts = (torch.rand(rows, 1, generator=draw) > 0.2).double()
    if kind == "spans" and columns:
        counts = counts[ids[:, 0]]
    gold = torch.randint(0, vocab, (rows, 1), generator=draw)
    return Targets(torch.cat([gold, ids], 1), torch.cat([counts, counts * weights], 1))


def gradients(loss, inputs):
    """By those of `inputs` that want one; zeros where the loss does not depend on them."""
    wanted = [one for one in inputs if one is not None and one.requires_grad]
    found = torch.autograd.grad(loss, wanted, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(one) if own is None else own for own, one in zip(found, wanted, strict=True)]


def assert_close(found, wanted, tolerance=1e-12):
    """Relative to the largest entry, or to 1."""
    wanted = wanted.detach()
    largest = float(wanted.abs().max()) if wanted.numel() else 0.0
    torch.testing.assert_close(found.detach(), wanted, rtol=0, atol=tolerance * max(1.0, largest))


def assert_same(found, wanted, inputs, tolerance=1e-12):
    """Value and all gradients."""
    assert_close(found, wanted, tolerance)
    for one, other in zip(gradients(found * 0.7, inputs), gradients(wanted * 0.7, inputs), strict=True):
        assert_close(one, other, tolerance)
