"""Random masks from a counter-based generator: every element's fate is a pure function of its key.

The key is (seed, target, tensor name, element index), so neither threads, nor chunks, nor the order of tensors, nor
a resumed run can change a mask. The generator is Philox-4x32-10 (https://doi.org/10.1145/2063384.2063405). SHA-256 of
seed, target and name gives its key and the upper half of its counter; the lower half counts. Elements are dealt to its
words in groups of 2,048: the first 512 get the first words of 512 counter values, the next 512 the second words, and
so on, as vector registers want it.
"""

import hashlib
import math
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from fusion.merging.numerics.arithmetic import on_cpu

NUM_WORDS = 4
LANES = 512
"""Counter values that are computed together."""
GROUP = NUM_WORDS * LANES
RANGE = 1 << 32
MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
KEY_STEPS = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
WORD, HALF = np.uint64(0xFFFF_FFFF), np.uint64(32)
ZERO = np.float32(0)


Key = tuple[int, int, str]
"""Seed, index of the target, name of the tensor."""


def random_words(count: int, key: Key, start: int = 0) -> np.ndarray:
    """Random uint32 words [count] of the elements `start`, `start + 1`, ..."""
    words_N = np.empty(count, dtype=np.uint32)
    _fill(start, _words_of(key), words_N)
    return words_N


def random_shares(count: int, key: Key, start: int = 0) -> Tensor:
    """Uniform float64 numbers from 0 (included) to 1, [count]: of every element its own."""
    return torch.from_numpy(random_words(count, key, start) / RANGE)


def random_keep(density: float, count: int, key: Key, start: int = 0) -> Tensor:
    """Mask [count]: each element is kept with probability `density`, independently."""
    return random_shares(count, key, start) < density


def write_kept(values_N: Tensor, density: float, divisor: float, kept_N: Tensor, *, key: Key, start: int = 0) -> None:
    """Fill `kept_N` with v_n / divisor where `random_keep`, and else zero."""
    if on_cpu(values_N):
        limit = np.uint64(math.ceil(density * RANGE))
        _keep(start, _words_of(key), limit, np.float32(divisor), values_N.numpy(), kept_N.numpy())
    else:
        mask_N = random_keep(density, len(values_N), key, start).to(values_N)
        torch.mul(values_N, mask_N, out=kept_N).div_(divisor)


def _words_of(key: Key) -> np.ndarray:
    """Two words of the generator's key and two of its counter, each in a uint64."""
    seed, target, name = key
    digest = hashlib.sha256(f"{seed}\0{target}\0{name}".encode()).digest()
    return np.frombuffer(digest[:16], dtype="<u4").astype(np.uint64)


@njit(cache=True, nogil=True)
def _fill(start: int, key: Any, words_N: Any) -> None:
    made_G = np.empty(GROUP, dtype=np.uint32)
    for group in range(start // GROUP, (start + len(words_N) - 1) // GROUP + 1):
        philox(np.uint64(group * LANES), key, made_G)
        first, last = max(start, group * GROUP), min(start + len(words_N), (group + 1) * GROUP)
        words_N[first - start : last - start] = made_G[first - group * GROUP : last - group * GROUP]


@njit(cache=True, nogil=True, error_model="numpy")
def _keep(start: int, key: Any, limit: Any, divisor: Any, values_N: Any, kept_N: Any) -> None:
    made_G = np.empty(GROUP, dtype=np.uint32)
    for group in range(start // GROUP, (start + len(values_N) - 1) // GROUP + 1):
        philox(np.uint64(group * LANES), key, made_G)
        first, last = max(start, group * GROUP), min(start + len(values_N), (group + 1) * GROUP)
        made_P = made_G[first - group * GROUP : last - group * GROUP]
        values_P, kept_P = values_N[first - start : last - start], kept_N[first - start : last - start]
        for n in range(len(made_P)):
            kept_P[n] = values_P[n] / divisor if made_P[n] < limit else ZERO


@njit(cache=True, nogil=True, inline="always")
def _round(a: Any, b: Any, c: Any, d: Any, key_0: Any, key_1: Any) -> Any:
    product_0, product_1 = MULTIPLIERS[0] * a, MULTIPLIERS[1] * c
    return product_1 >> HALF ^ b ^ key_0, product_1 & WORD, product_0 >> HALF ^ d ^ key_1, product_0 & WORD


@njit(cache=True, nogil=True)
def philox(first: Any, key: Any, words_G: Any) -> None:
    """The words of `LANES` counter values from `first` on: all first words, all second ones, and so on.

    `key`: as of `_words_of`. Ten rounds, written out: a loop would keep the one around it out of vector registers.
    """
    key_0, key_1, upper_0, upper_1 = key[0] & WORD, key[1] & WORD, key[2] & WORD, key[3] & WORD
    step_0, step_1 = KEY_STEPS
    for i in range(LANES):
        a, b, c, d = first + np.uint64(i) & WORD, first + np.uint64(i) >> HALF, upper_0, upper_1
        k, m = key_0, key_1
        a, b, c, d = _round(a, b, c, d, k, m)
        k, m = k + step_0 & WORD, m + step_1 & WORD
        a, b, c, d = _round(a, b, c, d, k, m)
        k, m = k + step_0 & WORD, m + step_1 & WORD
        a, b, c, d = _round(a, b, c, d, k, m)
        k, m = k + step_0 & WORD, m + step_1 & WORD
        a, b, c, d = _round(a, b, c, d, k, m)
        k, m = k + step_0 & WORD, m + step_1 & WORD
        a, b, c, d = _round(a, b, c, d, k, m)
        k, m = k + step_0 & WORD, m + step_1 & WORD
        a, b, c, d = _round(a, b, c, d, k, m)
        k, m = k + step_0 & WORD, m + step_1 & WORD
        a, b, c, d = _round(a, b, c, d, k, m)
        k, m = k + step_0 & WORD, m + step_1 & WORD
        a, b, c, d = _round(a, b, c, d, k, m)
        k, m = k + step_0 & WORD, m + step_1 & WORD
        a, b, c, d = _round(a, b, c, d, k, m)
        k, m = k + step_0 & WORD, m + step_1 & WORD
        a, b, c, d = _round(a, b, c, d, k, m)
        words_G[i], words_G[LANES + i] = np.uint32(a), np.uint32(b)
        words_G[2 * LANES + i], words_G[3 * LANES + i] = np.uint32(c), np.uint32(d)
