"""Teacher rows in some 20 bytes each: entropy-coded ids, 8-bit probabilities, 16-bit NLLs.

- Ids: the frequent tokens of a shard are numbered by frequency; a number is a symbol byte (all of it below 128, else
  its magnitude and three leading bits) and the remaining bits, packed. The symbols are what zstandard compresses.
- Probabilities: only the ratios of the others to the most likely candidate are coded, in steps that grow with the
  distance (`RATIO`), as differences along the row; and the odds of the candidates against the tail. So decoded rows
  hold a mass of 1, tail included, by construction.
- NLL: 16 bits of its square root, and the exact sum of every dialogue.
Array legend: D dialogues of a block, R rows, K candidates, E candidates of all rows (all first ones, then all second
ones, and so on), X entries of E whose symbol is followed by bits, T tokens of the shard.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import ClassVar

import numpy as np
import zstandard

from fusion.teaching.teacher_rows import TeacherRows, check_candidates, filled

LEVEL = 9
"""Higher levels of zstandard look for longer matches, and these columns have none."""
COLUMNS = ("counts", "symbols", "bits", "second", "others", "tail", "nll_high", "nll_low", "nll_sums")
PARTS = {
    "symbols": "ids",
    "bits": "ids",
    "second": "logprobs",
    "others": "logprobs",
    "nll_high": "nll",
    "nll_low": "nll",
    "nll_sums": "nll",
}
"""What a column belongs to, where its name does not say it."""
PLAIN = 128
"""Token numbers below are symbols of their own."""
LEADING_BITS = 3
HIGHEST_ID = (1 << 22) - 1
"""Symbols can say numbers below 2^23: those of frequent tokens, and behind them the ids of rare ones."""
FEWEST_USES = 4
"""Rarer tokens of a shard keep their id: a number for them would cost more than it saves."""
RANGE = 40.0
"""Nats: a candidate that is less than e^-40 times as likely as the first one is said to be just that."""
NO_TAIL = 255
NLL_STEPS = 4096.0
"""Steps per square root of a nat: 5e-4 nats at 1 nat; the highest NLL is 256 nats."""

_SYMBOLS = np.arange(256, dtype=np.int32)
BITS = np.where(_SYMBOLS < PLAIN, np.int32(0), (_SYMBOLS - PLAIN) // 8 + 7 - LEADING_BITS)
"""Packed bits that follow a symbol."""
BASE = np.where(_SYMBOLS < PLAIN, _SYMBOLS, (8 + _SYMBOLS % 8) << BITS)
"""The lowest number of a symbol."""
RATIO_STEP = np.log1p(RANGE) / 255
RATIO = np.expm1(_SYMBOLS * RATIO_STEP)
"""Nats between the first candidate and one of code c: 0 to 40, in steps of 0.015 (1 + nats)."""
_ODDS_STEP = np.log1p(RANGE) / 127
_ODDS = np.sign(_SYMBOLS[:255] - 127) * np.expm1(np.abs(_SYMBOLS[:255] - 127) * _ODDS_STEP)
TAIL = np.append(1 / (1 + np.exp(_ODDS)), 0).astype(np.float32)
"""Tail mass of code c; `NO_TAIL` is 0."""
LOG_HEAD = np.append(-np.log1p(np.exp(-_ODDS)), 0)
"""Logarithm of the candidates' mass."""


@dataclass(frozen=True)
class Compact:
    """The compact coding of one shard."""

    tokens_T: np.ndarray
    """int64: the frequent tokens, most frequent first."""
    highest_id: int

    name: ClassVar[str] = "compact"
    block_rows: ClassVar[int] = 1024
    """Rows that are decoded together: more compress better, fewer are read faster in random order."""

    @classmethod
    def of(cls, dialogues: Sequence[TeacherRows]) -> "Compact":
        """The coding for a shard of these dialogues; ValueError when there is one that it could not say."""
        for rows in dialogues:
            check_candidates(rows, HIGHEST_ID)
        ids_E = np.concatenate([rows.ids_RK[rows.ids_RK >= 0] for rows in dialogues])
        uses = np.bincount(ids_E)
        tokens = np.flatnonzero(uses >= FEWEST_USES)
        return cls(tokens[np.lexsort((tokens, -uses[tokens]))], len(uses) - 1)

    @classmethod
    def from_bytes(cls, shared: bytes) -> "Compact":
        steps = _unplaned(zstandard.ZstdDecompressor().decompress(shared), "<i4")
        tokens_and_highest = np.cumsum(steps, dtype=np.int64)
        return cls(tokens_and_highest[:-1], int(tokens_and_highest[-1]))

    def to_bytes(self) -> bytes:
        return _compressed(_planes(np.diff(np.append(self.tokens_T, self.highest_id), prepend=0), "<i4"))

    def encode(self, dialogues: Sequence[TeacherRows]) -> bytes:
        """The bytes of a block of dialogues."""
        counts_R = np.concatenate([rows.counts_R for rows in dialogues])
        held_KR = np.arange(counts_R.max())[:, None] < counts_R
        ids_KR = _stacked([rows.ids_RK for rows in dialogues], held_KR, -1)
        logprobs_KR = _stacked([rows.logprobs_RK for rows in dialogues], held_KR, -np.inf)
        tail_R = np.concatenate([rows.tail_R for rows in dialogues]).astype(np.float64)
        nll_R = np.concatenate([rows.nll_R for rows in dialogues])
        symbols_E, bits = self._said(ids_KR[held_KR])
        differences_KR = _ratio_differences(logprobs_KR)
        nll_codes_R = np.rint(np.sqrt(np.maximum(nll_R, 0, dtype=np.float64)) * NLL_STEPS).clip(0, (1 << 16) - 1)
        columns = {
            "counts": _planes(counts_R, "<u4"),
            "symbols": symbols_E.tobytes(),
            "bits": bits,
            "second": differences_KR[1:2][held_KR[1:2]].tobytes(),
            "others": differences_KR[2:][held_KR[2:]].tobytes(),
            "tail": _tail_codes(logprobs_KR, tail_R).tobytes(),
            "nll_high": (nll_codes_R.astype(np.int64) >> 8).astype(np.uint8).tobytes(),
            "nll_low": (nll_codes_R.astype(np.int64) & 255).astype(np.uint8).tobytes(),
            "nll_sums": np.asarray([rows.total_nll for rows in dialogues], dtype="<f8").tobytes(),
        }
        frames = [_compressed(columns[name]) for name in COLUMNS]
        return np.asarray([len(frame) for frame in frames], dtype="<u4").tobytes() + b"".join(frames)

    def decode(self, data: np.ndarray, num_rows: Sequence[int]) -> list[TeacherRows]:
        """The dialogues of a block, with `num_rows` rows each."""
        columns = _columns(data)
        counts_R = _unplaned(columns["counts"], "<u4").astype(np.int64)
        held_KR = np.arange(counts_R.max())[:, None] < counts_R
        ids_KR = filled(held_KR, self._heard(columns["symbols"], columns["bits"]), -1)
        tail_codes_R = np.frombuffer(columns["tail"], np.uint8)
        logprobs_KR = _logprobs(held_KR, columns["second"] + columns["others"], LOG_HEAD[tail_codes_R])
        nll_high_R, nll_low_R = (np.frombuffer(columns[name], np.uint8) for name in ("nll_high", "nll_low"))
        nll_R = ((nll_high_R * 256.0 + nll_low_R) / NLL_STEPS) ** 2
        bounds = np.cumsum([0, *num_rows]).tolist()
        sums_D = np.frombuffer(columns["nll_sums"], "<f8").tolist()
        return [
            TeacherRows(ids, logprobs, TAIL[tail_codes_R[a:b]], nll_R[a:b].astype(np.float32), total)
            for (ids, logprobs), (a, b), total in zip(
                _cut(ids_KR, logprobs_KR, counts_R, bounds), pairwise(bounds), sums_D, strict=True
            )
        ]

    def parts(self, data: np.ndarray, num_rows: Sequence[int]) -> dict[str, int]:
        """Bytes of a block by what they say: ids, logprobs, tail, nll, counts."""
        sizes: dict[str, int] = {}
        for name, size in zip(COLUMNS, _sizes(data), strict=True):
            sizes[PARTS.get(name, name)] = sizes.get(PARTS.get(name, name), 0) + size
        return sizes

    def _said(self, ids_E: np.ndarray) -> tuple[np.ndarray, bytes]:
        """(uint8 symbols_E, packed bits) of token ids."""
        number_of = np.arange(self.highest_id + 1) + len(self.tokens_T)
        number_of[self.tokens_T] = np.arange(len(self.tokens_T))
        numbers_E = number_of[ids_E]
        magnitudes_E = np.frexp(numbers_E.astype(np.float64))[1] - 1
        widths_E = np.where(numbers_E < PLAIN, 0, magnitudes_E - LEADING_BITS)
        leading_E = numbers_E >> widths_E
        symbols_E = np.where(numbers_E < PLAIN, numbers_E, PLAIN + (magnitudes_E - 7) * 8 + leading_E - 8)
        longer = widths_E > 0
        return symbols_E.astype(np.uint8), _packed((numbers_E - BASE[symbols_E])[longer], widths_E[longer])

    def _heard(self, symbols: bytes, bits: bytes) -> np.ndarray:
        """int32 token ids of symbols and packed bits."""
        symbols_E = np.frombuffer(symbols, np.uint8)
        numbers_E = BASE.take(symbols_E)
        longer_X = np.flatnonzero(symbols_E >= PLAIN)
        numbers_E[longer_X] += _unpacked(bits, BITS.take(symbols_E.take(longer_X)))
        return self._id_of.take(numbers_E)

    @cached_property
    def _id_of(self) -> np.ndarray:
        """int32: the token of every number: the frequent ones, then every id."""
        return np.concatenate([self.tokens_T, np.arange(self.highest_id + 1)]).astype(np.int32)


def _ratio_differences(logprobs_KR: np.ndarray) -> np.ndarray:
    """uint8: the codes of the nats behind the first candidate, as differences to the candidate before."""
    behind_KR = np.minimum(logprobs_KR[:1] - logprobs_KR, RANGE)
    codes_KR = np.rint(np.log1p(behind_KR) / RATIO_STEP).astype(np.uint8)
    return np.diff(codes_KR, axis=0, prepend=np.uint8(0))


def _logprobs(held_KR: np.ndarray, differences: bytes, log_head_R: np.ndarray) -> np.ndarray:
    """float32 [K, R] log-probabilities from what `_ratio_differences` gave behind the first candidates."""
    codes_KR = np.zeros(held_KR.shape, dtype=np.uint8)
    codes_KR[1:] = filled(held_KR[1:], np.frombuffer(differences, np.uint8), 0)
    for before, codes in pairwise(codes_KR):  # np.cumsum is five times slower along this axis
        codes += before
    shares_KR = np.exp(-RATIO).take(codes_KR)
    shares_KR *= held_KR
    first_R = log_head_R - np.log(shares_KR.sum(axis=0))
    logprobs_KR = first_R.astype(np.float32) - RATIO.astype(np.float32).take(codes_KR)
    logprobs_KR[~held_KR] = -np.inf
    return logprobs_KR


def _tail_codes(logprobs_KR: np.ndarray, tail_R: np.ndarray) -> np.ndarray:
    """uint8: the odds of the candidates against the tail."""
    head_R = np.exp(logprobs_KR).sum(axis=0)
    odds_R = np.log(head_R) - np.log(np.where(tail_R > 0, tail_R, 1))
    steps_R = np.sign(odds_R) * np.rint(np.log1p(np.minimum(np.abs(odds_R), RANGE)) / _ODDS_STEP)
    return np.where(tail_R > 0, 127 + steps_R, NO_TAIL).astype(np.uint8)


def _stacked(arrays: Sequence[np.ndarray], held_KR: np.ndarray, filler: float) -> np.ndarray:
    """Candidates of all dialogues as float64 or int64 [K, R]."""
    dtype = np.int64 if arrays[0].dtype.kind == "i" else np.float64
    stacked_RK = np.full(held_KR.shape[::-1], filler, dtype=dtype)
    start = 0
    for array in arrays:
        width = min(array.shape[1], held_KR.shape[0])
        stacked_RK[start : start + len(array), :width] = array[:, :width]
        start += len(array)
    return np.ascontiguousarray(stacked_RK.T)


def _cut(
    ids_KR: np.ndarray, logprobs_KR: np.ndarray, counts_R: np.ndarray, bounds: Sequence[int]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(ids_RK, logprobs_RK) of every dialogue, as wide as its longest row."""
    widths_D = np.maximum.reduceat(counts_R, bounds[:-1]).tolist()
    ids_RK, logprobs_RK = np.ascontiguousarray(ids_KR.T), np.ascontiguousarray(logprobs_KR.T)
    for width, (a, b) in zip(widths_D, pairwise(bounds), strict=True):
        yield ids_RK[a:b, :width], logprobs_RK[a:b, :width]


def _packed(numbers_X: np.ndarray, widths_X: np.ndarray) -> bytes:
    """The lowest `widths_X` bits of the numbers, one behind the other, lowest first."""
    starts_X = np.cumsum(widths_X) - widths_X
    places = np.arange(widths_X.sum()) - np.repeat(starts_X, widths_X)
    bits = np.repeat(numbers_X, widths_X) >> places & 1
    return np.packbits(bits.astype(np.uint8), bitorder="little").tobytes()


def _unpacked(bits: bytes, widths_X: np.ndarray) -> np.ndarray:
    """int32 numbers of `_packed`: each lies within the four bytes from its first bit on."""
    padded = bits + bytes(4)
    windows = np.ndarray(len(bits) + 1, dtype="<u4", buffer=padded, strides=(1,))
    starts_X = np.cumsum(widths_X, dtype=np.int32) - widths_X
    shifted_X = windows[starts_X >> 3] >> (starts_X & 7).astype(np.uint32)
    return shifted_X.astype(np.int32) & (np.int32(1) << widths_X) - np.int32(1)


def _planes(numbers: np.ndarray, dtype: str) -> bytes:
    """The lowest bytes of all numbers, then the next ones: alike bytes side by side compress well."""
    stacked = numbers.astype(dtype).view(np.uint8).reshape(len(numbers), np.dtype(dtype).itemsize)
    return np.ascontiguousarray(stacked.T).tobytes()


def _unplaned(data: bytes, dtype: str) -> np.ndarray:
    width = np.dtype(dtype).itemsize
    planes = np.frombuffer(data, np.uint8).reshape(width, len(data) // width)
    return np.ascontiguousarray(planes.T).view(dtype).ravel()


def _compressed(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=LEVEL).compress(data)


def _sizes(data: np.ndarray) -> list[int]:
    return data[: 4 * len(COLUMNS)].view("<u4").tolist()


def _columns(data: np.ndarray) -> dict[str, bytes]:
    decompressor = zstandard.ZstdDecompressor()
    ends = np.cumsum([4 * len(COLUMNS), *_sizes(data)]).tolist()
    frames = (data[a:b].data for a, b in pairwise(ends))
    return {name: decompressor.decompress(frame) for name, frame in zip(COLUMNS, frames, strict=True)}
