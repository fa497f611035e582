"""The nearest string of a vocabulary by edit distance, exactly, for a whole other vocabulary.

Before a distance is computed, it is bounded from below by what two strings do not share: every string has a signature,
the set of (character, how often so far) folded into 128 bits, and an edit changes at most one member on each side. The
candidates are tried from the lowest bound on, and left out once their bound says that they cannot win any more.
Distances are bit-parallel: https://doi.org/10.1145/316542.316550 (Myers), in Hyyrö's form.
Legend: S strings that are sought among, shortest first, Q queries, C characters of several strings, A characters of
the alphabet, L lengths.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numba import njit

WORD = 64
OWN_BITS = 104
"""Members so frequent that they have a bit of the signature of their own; the others share what is left."""
TIMES = 4
"""Occurrences of one character that signatures tell apart; all later ones are one member."""
FOREIGN = 0
"""The code of characters that none of the strings has."""
UNICODE = 0x110000
FAR = 1 << 30


class Strings(NamedTuple):
    """Strings as codes of characters, one string after the other."""

    codes_C: np.ndarray
    """int32."""
    offsets: np.ndarray
    """int64, one more than there are strings."""
    low: np.ndarray
    """uint64: the first half of every signature."""
    high: np.ndarray
    """uint64: the second half."""


class NearestStrings:
    """Strings to be found by others: the first, in order, of those that take the fewest edits."""

    def __init__(self, strings: Sequence[str]) -> None:
        """Raises ValueError if there are no strings."""
        if not len(strings):
            raise ValueError("there is no nearest string among none")
        lengths = np.fromiter(map(len, strings), dtype=np.int64, count=len(strings))
        self._order_S = np.argsort(lengths, kind="stable")
        self._first_L = np.searchsorted(lengths[self._order_S], np.arange(lengths.max() + 2))
        self._known = frozenset(strings)
        self._shortest = int(lengths.min())
        shortest_first = [strings[number] for number in self._order_S.tolist()]
        alphabet = np.unique(_characters(shortest_first))
        self._code_of = np.full(UNICODE, FOREIGN, dtype=np.int32)
        self._code_of[alphabet] = np.arange(FOREIGN + 1, FOREIGN + 1 + len(alphabet))
        codes_C, offsets = self._codes(shortest_first)
        self._bit_of_AT = _bits(_occurrences(codes_C, offsets, len(alphabet) + 1))
        self._strings = Strings(codes_C, offsets, *_signatures(codes_C, offsets, self._bit_of_AT))

    def nearest(self, queries: Sequence[str]) -> np.ndarray:
        """int64 [Q]: the number of the string that is nearest to each query, the lowest of those equally near."""
        codes_C, offsets = self._codes(queries)
        asked = Strings(codes_C, offsets, *_signatures(codes_C, offsets, self._bit_of_AT))
        bound_Q = np.fromiter(map(self._bound, queries), dtype=np.int64, count=len(queries))
        return _nearest(*asked, bound_Q, *self._strings, self._order_S, self._first_L, len(self._bit_of_AT))

    def _bound(self, query: str) -> int:
        """Edits to the longest beginning or end of the query that is a string, or to the shortest string."""
        for length in range(len(query), 0, -1):
            if query[:length] in self._known or query[-length:] in self._known:
                return len(query) - length
        return max(len(query), self._shortest)

    def _codes(self, strings: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        lengths = np.fromiter(map(len, strings), dtype=np.int64, count=len(strings))
        return self._code_of[_characters(strings)], np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])


def _characters(strings: Sequence[str]) -> np.ndarray:
    return np.frombuffer("".join(strings).encode("utf-32-le", "surrogatepass"), dtype=np.uint32)


def _bits(occurrences_AT: np.ndarray) -> np.ndarray:
    """int64 [A, TIMES]: the bit of the signature that stands for a member; the rarer ones take turns."""
    bit_of_AT = np.empty(occurrences_AT.size, dtype=np.int64)
    by_frequency = np.argsort(-occurrences_AT.ravel(), kind="stable")
    turn = np.arange(len(by_frequency))
    bit_of_AT[by_frequency] = np.where(turn < OWN_BITS, turn, OWN_BITS + turn % (2 * WORD - OWN_BITS))
    return bit_of_AT.reshape(occurrences_AT.shape)


@njit(cache=True, nogil=True)
def _occurrences(codes_C: np.ndarray, offsets: np.ndarray, num_codes: int) -> np.ndarray:
    """int64 [A, TIMES]: how many strings have each member."""
    occurrences_AT, seen_A = np.zeros((num_codes, TIMES), dtype=np.int64), np.zeros(num_codes, dtype=np.int64)
    for s in range(len(offsets) - 1):
        for code in codes_C[offsets[s] : offsets[s + 1]]:
            occurrences_AT[code, min(seen_A[code], TIMES - 1)] += 1
            seen_A[code] += 1
        for code in codes_C[offsets[s] : offsets[s + 1]]:
            seen_A[code] = 0
    return occurrences_AT


@njit(cache=True, nogil=True)
def _signatures(codes_C: np.ndarray, offsets: np.ndarray, bit_of_AT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint64 twice: the halves of every string's signature; foreign characters are no members."""
    size, seen_A = len(offsets) - 1, np.zeros(len(bit_of_AT), dtype=np.int64)
    low, high = np.zeros(size, dtype=np.uint64), np.zeros(size, dtype=np.uint64)
    for s in range(size):
        for code in codes_C[offsets[s] : offsets[s + 1]]:
            if code != FOREIGN:
                bit = bit_of_AT[code, min(seen_A[code], TIMES - 1)]
                seen_A[code] += 1
                if bit < WORD:
                    low[s] |= np.uint64(1) << np.uint64(bit)
                else:
                    high[s] |= np.uint64(1) << np.uint64(bit - WORD)
        for code in codes_C[offsets[s] : offsets[s + 1]]:
            seen_A[code] = 0
    return low, high


@njit(cache=True, nogil=True)
def _nearest(
    query_codes_C: np.ndarray,
    query_offsets: np.ndarray,
    query_low_Q: np.ndarray,
    query_high_Q: np.ndarray,
    bound_Q: np.ndarray,
    codes_C: np.ndarray,
    offsets: np.ndarray,
    low_S: np.ndarray,
    high_S: np.ndarray,
    order_S: np.ndarray,
    first_L: np.ndarray,
    num_codes: int,
) -> np.ndarray:
    nearest_Q = np.empty(len(bound_Q), dtype=np.int64)
    least_S = np.empty(len(low_S), dtype=np.int32)
    found_S, chosen_S = np.empty(len(low_S) + 1, dtype=np.int32), np.empty(len(low_S), dtype=np.int32)
    places_A = np.zeros(num_codes, dtype=np.uint64)
    for q in range(len(bound_Q)):
        query = query_codes_C[query_offsets[q] : query_offsets[q + 1]]
        begin, end = _possible(len(query), bound_Q[q], first_L)
        _least_distances(query, query_low_Q[q], query_high_Q[q], low_S, high_S, first_L, bound_Q[q], least_S)
        num_chosen = _best_first(least_S[begin:end], begin, bound_Q[q], found_S, chosen_S)
        _mark(query, places_A)
        best, number = bound_Q[q], FAR
        for s in chosen_S[:num_chosen]:
            if least_S[s] > best:
                break
            if least_S[s] < best or order_S[s] < number:
                limit = best if order_S[s] < number else best - 1
                distance = _distance(query, places_A, codes_C[offsets[s] : offsets[s + 1]], limit)
                if distance <= limit:
                    best, number = distance, order_S[s]
        nearest_Q[q] = number
        for code in query:
            places_A[code] = 0
    return nearest_Q


@njit(cache=True, nogil=True)
def _possible(length: int, bound: int, first_L: np.ndarray) -> tuple[int, int]:
    """The strings whose length differs by at most `bound`."""
    longest = len(first_L) - 2
    return first_L[min(max(length - bound, 0), longest + 1)], first_L[min(length + bound, longest) + 1]


@njit(cache=True, nogil=True)
def _least_distances(
    query: np.ndarray,
    query_low: np.uint64,
    query_high: np.uint64,
    low_S: np.ndarray,
    high_S: np.ndarray,
    first_L: np.ndarray,
    bound: int,
    least_S: np.ndarray,
) -> None:
    """Lower bounds of the distances to all strings whose length differs by at most `bound`, into `least_S`."""
    foreign = 0
    for code in query:
        foreign += code == FOREIGN
    for length in range(max(len(query) - bound, 0), min(len(query) + bound + 1, len(first_L) - 1)):
        begin, end = first_L[length], first_L[length + 1]
        ours, theirs = foreign + max(length - len(query), 0), max(len(query) - length, 0)
        _unshared(query_low, query_high, ours, theirs, low_S[begin:end], high_S[begin:end], least_S[begin:end])


@njit(cache=True, nogil=True)
def _unshared(
    query_low: np.uint64,
    query_high: np.uint64,
    ours: int,
    theirs: int,
    low_S: np.ndarray,
    high_S: np.ndarray,
    least_S: np.ndarray,
) -> None:
    """The larger of the numbers of members that only one side has, on top of `ours` and `theirs`."""
    for s in range(len(least_S)):
        mine = _popcount(query_low & ~low_S[s]) + _popcount(query_high & ~high_S[s])
        other = _popcount(low_S[s] & ~query_low) + _popcount(high_S[s] & ~query_high)
        least_S[s] = max(np.int64(mine) + ours, np.int64(other) + theirs)


@njit(cache=True, nogil=True)
def _popcount(word: np.uint64) -> np.uint64:
    """How many bits are set: the form that the compiler knows as one instruction."""
    pairs = word - ((word >> np.uint64(1)) & np.uint64(0x5555555555555555))
    fours = (pairs & np.uint64(0x3333333333333333)) + ((pairs >> np.uint64(2)) & np.uint64(0x3333333333333333))
    eights = (fours + (fours >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return (eights * np.uint64(0x0101010101010101)) >> np.uint64(56)


@njit(cache=True, nogil=True)
def _best_first(least_S: np.ndarray, begin: int, bound: int, found_S: np.ndarray, sorted_S: np.ndarray) -> int:
    """Sort the strings from `begin` on whose least distance is at most `bound` by it; how many there are."""
    num_found = 0
    for s in range(len(least_S)):
        found_S[num_found] = s
        num_found += least_S[s] <= bound
    start_of = np.zeros(bound + 2, dtype=np.int64)
    for s in found_S[:num_found]:
        start_of[least_S[s] + 1] += 1
    for least in range(bound + 1):
        start_of[least + 1] += start_of[least]
    for s in found_S[:num_found]:
        sorted_S[start_of[least_S[s]]] = begin + s
        start_of[least_S[s]] += 1
    return num_found


@njit(cache=True, nogil=True)
def _mark(query: np.ndarray, places_A: np.ndarray) -> None:
    if len(query) <= WORD:
        for place in range(len(query)):
            if query[place] != FOREIGN:
                places_A[query[place]] |= np.uint64(1) << np.uint64(place)


@njit(cache=True, nogil=True)
def _distance(query: np.ndarray, places_A: np.ndarray, other: np.ndarray, limit: int) -> int:
    """Edit distance of a query marked in `places_A` to another string, or more than `limit` if it is more."""
    if len(query) > WORD or not len(query):
        return _long_distance(query, other)
    ones = ~np.uint64(0)
    plus, minus, last = ones, np.uint64(0), np.uint64(1) << np.uint64(len(query) - 1)
    distance, left = len(query), len(other)
    for code in other:
        equal = places_A[code]
        vertical = equal | minus
        horizontal = (((equal & plus) + plus) ^ plus) | equal
        up, down = minus | ~(horizontal | plus), plus & horizontal
        if up & last:
            distance += 1
        elif down & last:
            distance -= 1
        left -= 1
        if distance - left > limit:
            return FAR
        up, down = (up << np.uint64(1)) | np.uint64(1), down << np.uint64(1)
        plus, minus = down | ~(vertical | up), up & vertical
    return distance


@njit(cache=True, nogil=True)
def _long_distance(query: np.ndarray, other: np.ndarray) -> int:
    row = np.arange(len(other) + 1)
    for i in range(len(query)):
        diagonal, row[0] = row[0], i + 1
        for j in range(len(other)):
            change = diagonal + (query[i] != other[j])
            diagonal = row[j + 1]
            row[j + 1] = min(change, row[j] + 1, diagonal + 1)
    return row[len(other)]
