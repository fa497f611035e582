"""Rows of plausible teachers, where no large model is at hand.

`trigram_dialogues` are an interpolated trigram model over a real tokeniser's ids, scaled to the sharpness of a
language model: real tokens in real contexts, but fewer different candidates than a large model has. `zipf_dialogues`
are the harder ones to store: candidates are drawn from Zipf's law over the whole vocabulary, without any context.
Array legend: R rows, K candidates, M tokens that are looked at.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import numpy as np

from fusion.teaching.teacher_rows import TeacherRows

TOP_K = 10
DISCOUNT = 0.4
SHARPNESS = 3.0
"""Exponent on the trigram model's probabilities: a language model is surer than counts are."""
UNIGRAMS = 64
"""Most frequent tokens, candidates in every context."""


def trigram_dialogues(texts: Sequence[Sequence[int]]) -> list[TeacherRows]:
    """Rows of an absolutely discounted trigram model of `texts` (token ids) at every token from the third on."""
    unigrams = Counter(token for text in texts for token in text)
    bigrams: dict[int, Counter[int]] = defaultdict(Counter)
    trigrams: dict[tuple[int, int], Counter[int]] = defaultdict(Counter)
    for text in texts:
        for first, second in pairwise(text):
            bigrams[first][second] += 1
        for first, second, third in zip(text, text[1:], text[2:], strict=False):
            trigrams[first, second][third] += 1
    frequent = [token for token, _ in unigrams.most_common(UNIGRAMS)]
    total = unigrams.total()

    @cache
    def row(first: int, second: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids_M, probs_M), most likely first; what is not looked at is the last entry, with id -1."""
        pairs, triples = bigrams[second], trigrams[first, second]
        ids_M = np.asarray(sorted({*frequent, *pairs, *triples}))
        plain_M = np.asarray([unigrams[token] for token in ids_M]) / total
        probs_M = _backed_off(triples, ids_M, _backed_off(pairs, ids_M, plain_M))
        probs_M = np.append(probs_M, max(1 - probs_M.sum(), 0)) ** SHARPNESS
        order = np.lexsort((ids_M, -probs_M[:-1]))
        return np.append(ids_M[order], -1), np.append(probs_M[:-1][order], probs_M[-1]) / probs_M.sum()

    return [_rows([row(*context) for context in pairwise(text[:-1])], text[2:]) for text in texts if len(text) > 2]


def _backed_off(counts: Counter[int], ids_M: np.ndarray, lower_M: np.ndarray) -> np.ndarray:
    """Absolute discounting: what the seen tokens give up goes to the lower order."""
    seen_M = np.asarray([counts[token] for token in ids_M])
    return (np.maximum(seen_M - DISCOUNT, 0) + DISCOUNT * len(counts) * lower_M) / counts.total()


def _rows(rows: Sequence[tuple[np.ndarray, np.ndarray]], references: Sequence[int]) -> TeacherRows:
    ids_RK = np.stack([ids_M[:TOP_K] for ids_M, _ in rows]).astype(np.int32)
    probs_RK = np.stack([probs_M[:TOP_K] for _, probs_M in rows])
    found = [probs_M[ids_M == token] for (ids_M, probs_M), token in zip(rows, references, strict=True)]
    nll_R = -np.log([one[0] if len(one) else 1e-9 for one in found])
    return _teacher_rows(ids_RK, np.log(probs_RK), nll_R)


def zipf_dialogues(vocabulary: int, dialogues: int, sharpness: float = 2.6, seed: int = 0) -> list[TeacherRows]:
    """Rows of 100 to 200 per dialogue whose logits are a sharpness, different in every row, times Gumbel noise."""
    rng = np.random.default_rng(seed)
    cumulative = np.cumsum(1 / np.arange(1, vocabulary + 1))
    tokens = rng.permutation(vocabulary)
    return [_zipf_rows(rng, cumulative / cumulative[-1], tokens, sharpness) for _ in range(dialogues)]


def _zipf_rows(rng: np.random.Generator, cumulative: np.ndarray, tokens: np.ndarray, sharpness: float) -> TeacherRows:
    num_rows, looked_at = int(rng.integers(100, 201)), 200
    # The largest of many Gumbel variables, in order, are minus the logarithms of the sums of exponential ones.
    sums_RM = np.cumsum(rng.exponential(size=(num_rows, looked_at)), axis=1)
    sharpness_R1 = 0.3 + sharpness * rng.lognormal(0, 0.6, (num_rows, 1))
    logits_RM = -sharpness_R1 * np.log(sums_RM)
    others_R1 = (sums_RM[:, -1:] ** (1 - sharpness_R1) - len(tokens) ** (1 - sharpness_R1)) / (sharpness_R1 - 1)
    highest_R1 = logits_RM.max(1, keepdims=True)
    mass_R1 = np.exp(logits_RM - highest_R1).sum(1, keepdims=True) + np.maximum(others_R1, 0) * np.exp(-highest_R1)
    logprobs_RM = logits_RM - highest_R1 - np.log(mass_R1)
    ids_RK = np.stack([_distinct(rng, cumulative, tokens) for _ in range(num_rows)]).astype(np.int32)
    references_R = (np.cumsum(np.exp(logprobs_RM), 1) < rng.random((num_rows, 1))).sum(1).clip(max=looked_at - 1)
    return _teacher_rows(ids_RK, logprobs_RM[:, :TOP_K], -logprobs_RM[np.arange(num_rows), references_R])


def _distinct(rng: np.random.Generator, cumulative: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """`TOP_K` different tokens in the order in which Zipf's law gave them."""
    drawn: list[int] = []
    while len(drawn) < TOP_K:
        drawn = list(dict.fromkeys([*drawn, *np.searchsorted(cumulative, rng.random(3 * TOP_K)).tolist()]))
    return tokens[np.minimum(drawn[:TOP_K], len(tokens) - 1)]


def _teacher_rows(ids_RK: np.ndarray, logprobs_RK: np.ndarray, nll_R: np.ndarray) -> TeacherRows:
    logprobs_RK = logprobs_RK.astype(np.float32)
    tail_R = np.maximum(1 - np.exp(logprobs_RK, dtype=np.float64).sum(1), 0).astype(np.float32)
    return TeacherRows(ids_RK, logprobs_RK, tail_R, nll_R.astype(np.float32))
