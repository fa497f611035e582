"""Random masks from a counter-based generator: every element's fate is a pure function of its key.

The key is (seed, target, tensor name, element index), so neither threads, nor chunks, nor the order of tensors, nor
a resumed run can change a mask. The generator is Philox-4x64-10 (https://doi.org/10.1145/2063384.2063405), word for
word NumPy's, which makes them one by one and takes ten times longer.
"""

import hashlib
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

WORDS_PER_COUNTER = 4  # Philox-4x64 makes four words of every counter value
COUNTERS = 512
"""Counter values that are computed together, word by word, so that vector registers can be used."""
MULTIPLIERS = np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157)
KEY_STEPS = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBB67AE8584CAA73B)
KEPT, DROPPED = np.float32(1), np.float32(0)
LOWER, HALF = np.uint64(0xFFFF_FFFF), np.uint64(32)


def random_words(seed: int, target: int, name: str, start: int, count: int) -> np.ndarray:
    """Random uint64 words [count] of the elements `start`, `start + 1`, ... of tensor `name` of target `target`."""
    first, skipped = divmod(start, WORDS_PER_COUNTER)
    words_CW = np.empty((-(-(skipped + count) // WORDS_PER_COUNTER), WORDS_PER_COUNTER), dtype=np.uint64)
    _fill(first, *_key(seed, target, name), words_CW)
    return words_CW.reshape(-1)[skipped : skipped + count]


def random_keep(density: float, count: int, *, seed: int, target: int, name: str, start: int = 0) -> Tensor:
    """Mask [count], float32: each element is kept (1.0) with probability `density`, independently, or not (0.0)."""
    if density >= 1:
        return torch.ones(count)
    first, skipped = divmod(start, WORDS_PER_COUNTER)
    mask_CW = torch.empty(-(-(skipped + count) // WORDS_PER_COUNTER), WORDS_PER_COUNTER)
    _keep(first, *_key(seed, target, name), np.uint64(int(density * 2**64)), mask_CW.numpy())
    return mask_CW.view(-1)[skipped : skipped + count]


def random_shares(count: int, *, seed: int, target: int, name: str, start: int = 0) -> Tensor:
    """Uniform float64 numbers from 0 (included) to 1, [count]: of every element its own."""
    words = random_words(seed, target, name, start, count)
    return torch.from_numpy((words >> np.uint64(11)) * 2.0**-53)


def _key(seed: int, target: int, name: str) -> tuple[np.uint64, np.uint64]:
    digest = hashlib.sha256(f"{seed}\0{target}\0{name}".encode()).digest()
    low, high = np.frombuffer(digest[:16], dtype="<u8")
    return low, high


@njit(cache=True, nogil=True)
def _fill(first: int, key_0: Any, key_1: Any, words_CW: Any) -> None:
    made_WC = np.empty((WORDS_PER_COUNTER, COUNTERS), dtype=np.uint64)
    for start in range(0, len(words_CW), COUNTERS):
        part_CW = words_CW[start : start + COUNTERS]
        _philox(np.uint64(first + start), key_0, key_1, made_WC[0], made_WC[1], made_WC[2], made_WC[3])
        for word in range(WORDS_PER_COUNTER):
            made_C = made_WC[word]
            for c in range(len(part_CW)):
                part_CW[c, word] = made_C[c]


@njit(cache=True, nogil=True)
def _keep(first: int, key_0: Any, key_1: Any, threshold: Any, mask_CW: Any) -> None:
    """1.0 where a word is below the threshold, else 0.0."""
    made_WC = np.empty((WORDS_PER_COUNTER, COUNTERS), dtype=np.uint64)
    for start in range(0, len(mask_CW), COUNTERS):
        part_CW = mask_CW[start : start + COUNTERS]
        _philox(np.uint64(first + start), key_0, key_1, made_WC[0], made_WC[1], made_WC[2], made_WC[3])
        for c in range(len(part_CW)):
            for word in range(WORDS_PER_COUNTER):
                part_CW[c, word] = KEPT if made_WC[word, c] < threshold else DROPPED


@njit(cache=True, nogil=True, inline="always")
def _high(a: Any, b: Any) -> Any:
    """Upper 64 of the 128 bits of a * b."""
    low_high = (a & LOWER) * (b >> HALF)
    high_low = (a >> HALF) * (b & LOWER)
    middle = ((a & LOWER) * (b & LOWER) >> HALF) + (low_high & LOWER) + high_low
    return (a >> HALF) * (b >> HALF) + (low_high >> HALF) + (middle >> HALF)


@njit(cache=True, nogil=True, inline="always")
def _round(a: Any, b: Any, c: Any, d: Any, key_0: Any, key_1: Any) -> Any:
    high_0, high_1 = _high(MULTIPLIERS[0], a), _high(MULTIPLIERS[1], c)
    return high_1 ^ b ^ key_0, MULTIPLIERS[1] * c, high_0 ^ d ^ key_1, MULTIPLIERS[0] * a


@njit(cache=True, nogil=True)
def _philox(first: Any, key_0: Any, key_1: Any, out_0_C: Any, out_1_C: Any, out_2_C: Any, out_3_C: Any) -> None:
    """All four words of the counter values behind `first`: NumPy counts up before it computes.

    Ten rounds, written out: a loop would keep the one around it out of vector registers.
    """
    step_0, step_1 = KEY_STEPS
    for i in range(len(out_0_C)):
        a, b, c, d = first + np.uint64(i) + np.uint64(1), np.uint64(0), np.uint64(0), np.uint64(0)
        k, m = key_0, key_1
        a, b, c, d = _round(a, b, c, d, k, m)
        k, m = k + step_0, m + step_1
        a, b, c, d = _round(a, b, c, d, k, m)
        k, m = k + step_0, m + step_1
        a, b, c, d = _round(a, b, c, d, k, m)
        k, m = k + step_0, m + step_1
        a, b, c, d = _round(a, b, c, d, k, m)
        k, m = k + step_0, m + step_1
        a, b, c, d = _round(a, b, c, d, k, m)
        k, m = k + step_0, m + step_1
        a, b, c, d = _round(a, b, c, d, k, m)
        k, m = k + step_0, m + step_1
        a, b, c, d = _round(a, b, c, d, k, m)
        k, m = k + step_0, m + step_1
        a, b, c, d = _round(a, b, c, d, k, m)
        k, m = k + step_0, m + step_1
        a, b, c, d = _round(a, b, c, d, k, m)
        k, m = k + step_0, m + step_1
        a, b, c, d = _round(a, b, c, d, k, m)
        out_0_C[i], out_1_C[i], out_2_C[i], out_3_C[i] = a, b, c, d
