"""Differentiable log-probabilities of a few tokens per row, without logits of the size [tokens, vocabulary].

For losses that are no cross-entropy. The logits of a chunk of rows live while the chunk is computed, and are computed
again in the backward pass, so that a loss may join rows of different chunks.

Tensor legend: T rows, H hidden size, V vocabulary, K asked ids per row, P most likely tokens.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fusion.objective.sparse_loss import require_fit, rows_per_chunk


def chosen_logprobs(
    hidden_TH: Tensor,
    head_VH: Tensor,
    ids_TK: Tensor,
    *,
    most_likely: int = 0,
    bias_V: Tensor | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities, in nats, of the ids [T, K], and of the P = min(`most_likely`, V) most likely tokens [T, P].

    The latter come in falling order. Both are float32 (float64 for float64 input) and differentiable with respect to
    hidden, head and bias.
    """
    require_fit(hidden_TH, head_VH, ids_TK)
    chunk = chunk_size or rows_per_chunk(len(head_VH), hidden_TH.device)
    top = min(most_likely, len(head_VH))
    chunks = [
        checkpoint(
            _of_chunk,
            hidden_TH[start : start + chunk],
            head_VH,
            bias_V,
            ids_TK[start : start + chunk],
            top,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for start in range(0, max(len(hidden_TH), 1), chunk)
    ]
    asked, likely = zip(*chunks, strict=True)
    return torch.cat(asked), torch.cat(likely)


def _of_chunk(
    hidden_TH: Tensor, head_VH: Tensor, bias_V: Tensor | None, ids_TK: Tensor, top: int
) -> tuple[Tensor, Tensor]:
    logits = (hidden_TH @ head_VH.T).to(torch.promote_types(hidden_TH.dtype, torch.float32))
    if bias_V is not None:
        logits = logits + bias_V
    normaliser = logits.logsumexp(-1, keepdim=True)
    return logits.gather(-1, ids_TK) - normaliser, logits.topk(top, dim=-1).values - normaliser
