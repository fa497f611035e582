"""How an optimiser step is cut into micro-batches and dealt to devices: a pure function of lengths and limits.

Every device gets as many parts. They are as few as the limits allow, then as small as that many can be, so that
devices wait little for each other. Places are positions in the step's list of dialogues.
"""

import heapq
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np


@dataclass(frozen=True)
class Limits:
    """What a micro-batch may hold; 0: as much as there is."""

    dialogues: int = 0
    tokens: int = 0
    """Padding included; a dialogue that is longer is a micro-batch of its own."""
    packed: bool = False
    """Dialogues stand one behind the other, so there is no padding."""

    def size(self, lengths: Sequence[int]) -> int:
        """Tokens of a micro-batch of dialogues with these lengths."""
        return sum(lengths) if self.packed else len(lengths) * max(lengths, default=0)


def deal(lengths: Sequence[int], world: int, limits: Limits) -> list[list[np.ndarray]]:
    """The micro-batches of every rank as int64 places in `lengths`, the largest first.

    Over all ranks every place occurs once. Where a step has fewer dialogues than there are parts, some are empty.
    """
    parts = cut(lengths, world, limits)
    sizes = [limits.size([lengths[place] for place in part]) for part in parts]
    order = sorted(range(len(parts)), key=sizes.__getitem__, reverse=True)
    ranks: list[list[np.ndarray]] = [[] for _ in range(world)]
    loads = [0] * world
    for start in range(0, len(order), world):  # parts of similar size run at the same time
        lightest_first = sorted(range(world), key=loads.__getitem__)
        for rank, part in zip(lightest_first, order[start : start + world], strict=True):
            ranks[rank].append(np.asarray(parts[part], dtype=np.int64))
            loads[rank] += sizes[part]
    return ranks


def cut(lengths: Sequence[int], world: int, limits: Limits) -> list[list[int]]:
    """Parts within the limits, a multiple of `world` of them."""
    longest_first = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    return (_packed if limits.packed else _padded)(lengths, longest_first, world, limits)


def _padded(lengths: Sequence[int], longest_first: Sequence[int], world: int, limits: Limits) -> list[list[int]]:
    """Dialogues of similar length together; the largest part is as small as the number of parts allows."""
    largest = limits.tokens or limits.size(lengths)
    number = _rounded_up(len(_runs(lengths, longest_first, largest, limits)), world)
    enough = bisect_left(
        range(largest), True, key=lambda tokens: len(_runs(lengths, longest_first, tokens, limits)) <= number
    )
    parts = _runs(lengths, longest_first, enough, limits)
    while len(parts) < number:
        whole = max(parts, key=lambda part: (len(part) > 1, limits.size([lengths[place] for place in part])))
        middle = -(-len(whole) // 2)
        parts.remove(whole)
        parts += [whole[:middle], whole[middle:]]
    return parts


def _runs(lengths: Sequence[int], longest_first: Sequence[int], tokens: int, limits: Limits) -> list[list[int]]:
    """Runs of neighbours with at most `tokens` tokens when padded to their first one, or one dialogue."""
    runs: list[list[int]] = []
    for place in longest_first:
        last = runs[-1] if runs else None
        if last and len(last) != limits.dialogues and (len(last) + 1) * lengths[last[0]] <= tokens:
            last.append(place)
        else:
            runs.append([place])
    return runs


def _packed(lengths: Sequence[int], longest_first: Sequence[int], world: int, limits: Limits) -> list[list[int]]:
    """Every dialogue goes to the part with the fewest tokens, the longest dialogues first."""
    counted = sum(min(length, limits.tokens) for length in lengths)  # what is longer fills a part of its own
    by_tokens = -(-counted // limits.tokens) if limits.tokens else 1
    by_dialogues = -(-len(lengths) // limits.dialogues) if limits.dialogues else 1
    numbers = count(_rounded_up(max(by_tokens, by_dialogues), world), world)
    attempts = (_filled(lengths, longest_first, number, limits) for number in numbers)
    return next(parts for parts in attempts if parts is not None)


def _filled(
    lengths: Sequence[int], longest_first: Sequence[int], number: int, limits: Limits
) -> list[list[int]] | None:
    """`number` parts, or None when that is too few."""
    parts: list[list[int]] = [[] for _ in range(number)]
    open_parts = [(0, part) for part in range(number)]  # a heap: the lightest one has the most room
    for place in longest_first:
        if not open_parts:
            return None
        tokens, part = heapq.heappop(open_parts)
        if parts[part] and limits.tokens and tokens + lengths[place] > limits.tokens:
            return None
        parts[part].append(place)
        if len(parts[part]) != limits.dialogues:
            heapq.heappush(open_parts, (tokens + lengths[place], part))
    return parts


def _rounded_up(number: int, step: int) -> int:
    return -(-number // step) * step
