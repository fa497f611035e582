"""Which candidates of a row are kept: the most likely ones, a nucleus, or unbiased draws.

Tensor legend: R rows, V vocabulary, K candidates, N draws.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fusion.config.schema import TeacherConfig

SLACK = 16
"""Further candidates that are looked at: among equals the lowest ids stay, and `topk` promises nothing of the kind."""


class Candidates(NamedTuple):
    """Candidates of rows, most likely first, the lower id first among equals; -1 and -inf where a row has fewer."""

    ids_RK: np.ndarray
    """int32"""
    logprobs_RK: np.ndarray
    """float32, in nats"""
    tail_R: np.ndarray
    """float32 mass outside the candidates"""


def select(logprobs_RV: Tensor, uniforms_RN: np.ndarray, settings: TeacherConfig) -> Candidates:
    """Candidates by `settings.rows`; `uniforms_RN` are numbers in [0, 1) that decide the draws (`rows=random`)."""
    if settings.rows == "random":
        return draw(logprobs_RV, uniforms_RN)
    likely = most_likely(logprobs_RV, settings.top_k)
    return nucleus(likely, settings.top_p) if settings.rows == "nucleus" else likely


def most_likely(logprobs_RV: Tensor, top_k: int) -> Candidates:
    """The `top_k` most likely tokens, or all where the vocabulary is smaller."""
    size = logprobs_RV.shape[1]
    width, looked_at = min(top_k, size), min(top_k + SLACK, size)
    ids = logprobs_RV.topk(looked_at).indices.sort().values
    logprobs = logprobs_RV.gather(1, ids)
    logprobs, order = logprobs.sort(dim=1, descending=True, stable=True)
    ids = ids.gather(1, order)
    # Equals reach to the end of what was looked at: there may be more of them, with lower ids.
    doubtful = torch.nonzero(logprobs[:, width - 1] == logprobs[:, -1]).squeeze(1)
    if looked_at < size and len(doubtful):
        ids[doubtful] = logprobs_RV[doubtful].sort(dim=1, descending=True, stable=True).indices[:, :looked_at]
    ids_RK, logprobs_RK = ids[:, :width].int().cpu().numpy(), logprobs[:, :width].cpu().numpy()
    return Candidates(ids_RK, logprobs_RK, _tail(logprobs_RK))


def nucleus(likely: Candidates, top_p: float) -> Candidates:
    """The fewest of the most likely tokens that hold a mass of `top_p`, at least one."""
    before_RK = np.cumsum(np.exp(likely.logprobs_RK, dtype=np.float64), axis=1)[:, :-1]
    left_out_RK = np.pad(before_RK >= top_p, ((0, 0), (1, 0)))
    logprobs_RK = np.where(left_out_RK, np.float32(-np.inf), likely.logprobs_RK)
    return Candidates(np.where(left_out_RK, np.int32(-1), likely.ids_RK), logprobs_RK, _tail(logprobs_RK))


def draw(logprobs_RV: Tensor, uniforms_RN: np.ndarray) -> Candidates:
    """Tokens drawn with replacement; the probability of each is its share of the draws, so its mean is the teacher's.

    Inverse of the cumulative distribution in double precision: equal numbers are equal draws on every device.
    https://arxiv.org/abs/2503.16870
    """
    num_rows, draws = uniforms_RN.shape
    cumulative_RV = logprobs_RV.double().exp().cumsum(1)
    wanted_RN = torch.from_numpy(uniforms_RN).to(cumulative_RV.device) * cumulative_RV[:, -1:]
    drawn_RN = torch.searchsorted(cumulative_RV, wanted_RN, right=True).clamp(max=logprobs_RV.shape[1] - 1)
    keys = (drawn_RN.cpu().numpy() + (np.arange(num_rows) << 32)[:, None]).ravel()
    keys, counts = np.unique(keys, return_counts=True)
    rows = keys >> 32
    order = np.lexsort((keys, -counts, rows))
    distinct_R = np.bincount(rows, minlength=num_rows)
    columns = np.arange(len(keys)) - np.repeat(np.cumsum(distinct_R) - distinct_R, distinct_R)
    ids_RK = np.full((num_rows, distinct_R.max()), -1, dtype=np.int32)
    logprobs_RK = np.full(ids_RK.shape, -np.inf, dtype=np.float32)
    ids_RK[rows, columns] = keys[order] & 0xFFFFFFFF
    logprobs_RK[rows, columns] = np.log(counts[order] / draws)
    return Candidates(ids_RK, logprobs_RK, np.zeros(num_rows, dtype=np.float32))


def uniforms(content_hash: str, num_rows: int, draws: int) -> np.ndarray:
    """float64 [R, N] in [0, 1): a row's numbers depend on its dialogue's content and its place in it, nothing else."""
    key = hashlib.sha256(f"teacher draws 0:{content_hash}".encode()).digest()[:16]
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
    return generator.random((num_rows, draws))


def joined(parts: Sequence[Candidates]) -> Candidates:
    """The rows of all parts, as wide as the widest."""
    width = max(part.ids_RK.shape[1] for part in parts)
    return Candidates(
        np.concatenate([_widened(part.ids_RK, width, -1) for part in parts]),
        np.concatenate([_widened(part.logprobs_RK, width, -np.inf) for part in parts]),
        np.concatenate([part.tail_R for part in parts]),
    )


def _widened(array_RK: np.ndarray, width: int, filler: float) -> np.ndarray:
    return np.pad(array_RK, ((0, 0), (0, width - array_RK.shape[1])), constant_values=filler)


def _tail(logprobs_RK: np.ndarray) -> np.ndarray:
    return np.maximum(1 - np.exp(logprobs_RK, dtype=np.float64).sum(1), 0).astype(np.float32)
