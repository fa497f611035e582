"""The published alignment in plain Python, as a yardstick: one cell, one position, one token at a time.

https://arxiv.org/abs/2401.10491 and https://arxiv.org/abs/2408.07990, with the rules of the authors' code that
`fusion/alignment/strategies/ms_released.py` lists. The edit distance of a cell is compiled code there and here.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from rapidfuzz.distance import Levenshtein

Cost = Callable[[str, str], int]


def piece_cost(source_marker: str, pivot_marker: str) -> Cost:
    """Edit distance of a source and a pivot piece without their markers, with them where nothing would be left."""

    def cost(source: str, pivot: str) -> int:
        bare_source, bare_pivot = source.replace(source_marker, ""), pivot.replace(pivot_marker, "")
        if not bare_source or not bare_pivot:
            bare_source, bare_pivot = source, pivot
        return Levenshtein.distance(bare_source, bare_pivot)

    return cost


def remembered(cost: Cost) -> Cost:
    """`cost`, asked once per pair of strings."""
    known: dict[tuple[str, str], int] = {}

    def ask(source: str, pivot: str) -> int:
        key = source, pivot
        if key not in known:
            known[key] = cost(source, pivot)
        return known[key]

    return ask


def plain_path(source: Sequence[str], pivot: Sequence[str], cost: Cost) -> list[list[int]]:
    """Source positions on the cheapest path at every pivot position."""
    total = np.full((len(pivot) + 1, len(source) + 1), np.inf)
    total[0, 0] = 0
    for i, ours in enumerate(pivot):
        for j, theirs in enumerate(source):
            total[i + 1, j + 1] = cost(theirs, ours) + min(total[i, j], total[i, j + 1], total[i + 1, j])
    images: list[list[int]] = [[] for _ in pivot]
    i, j = len(pivot), len(source)
    while i and j:
        images[i - 1].insert(0, j - 1)
        steps = [(i - 1, j - 1), (i - 1, j), (i, j - 1)]
        i, j = steps[int(np.argmin([total[step] for step in steps]))]
    return images


class PlainMapping:
    """Distributions on the pivot's positions: lists of ids and logits, filled token by token."""

    def __init__(
        self,
        vocabulary: Mapping[str, int],
        source_strings: Callable[[int], str],
        source_to_pivot: Mapping[int, int],
        markers: tuple[str, str],
    ) -> None:
        """`source_strings` gives a token string by id; `markers` are the pivot's and the source's."""
        self._vocabulary, self._source_strings, self._source_to_pivot = vocabulary, source_strings, source_to_pivot
        self._ours, self._theirs = markers

    def rows(
        self,
        pivot: Sequence[str],
        source: Sequence[str],
        images: Sequence[Sequence[int]],
        labels: Sequence[int],
        support: tuple[Sequence[Sequence[int]], Sequence[Sequence[float]]],
    ) -> tuple[list[list[int]], list[list[float]]]:
        """(ids, logits) per pivot position; `pivot` and `source` are pieces, `support` the source's ids and logits."""
        ids: list[list[int]] = []
        logits: list[list[float]] = []
        for position, image in enumerate(images):
            chosen = self._choose(pivot[position], [source[j] for j in image])
            if chosen is None:
                row_ids, row_logits = [labels[position]], [1.0]
            elif chosen < 0:
                row_ids, row_logits = [], []
            else:
                row_ids, row_logits = self._mapped(support[0][image[chosen]], support[1][image[chosen]])
            ids.append(row_ids)
            logits.append(row_logits)
        return ids, logits

    def _mapped(self, ids: Sequence[int], logits: Sequence[float]) -> tuple[list[int], list[float]]:
        row_ids: list[int] = []
        row_logits: list[float] = []
        for token, logit in zip(ids, logits, strict=True):
            string = self._source_strings(token).replace(self._theirs, self._ours)
            target = self._vocabulary[string] if string in self._vocabulary else self._source_to_pivot[token]
            if target not in row_ids:
                row_ids.append(target)
                row_logits.append(logit)
        return row_ids, row_logits

    def _choose(self, piece: str, image: list[str]) -> int | None:
        """Which piece of the image speaks: None for the label alone, -1 for nobody."""
        if len(image) == 1:
            said = image[0].replace(self._theirs, self._ours)
            return 0 if said.endswith(piece) or piece.endswith(said) else None
        bare, pieces = piece.replace(self._ours, ""), [each.replace(self._theirs, "") for each in image]
        if piece != self._ours:
            for number, each in enumerate(pieces):
                if bare.endswith(each) or each.endswith(bare):
                    return number
        rest, matched = bare, 0
        for each in pieces:
            if not rest or not rest.startswith(each):
                break
            rest, matched = rest[len(each) :], matched + 1
        if matched and not rest:
            return matched - 1
        joined = "".join(pieces)
        return -1 if joined.endswith(bare) or bare.endswith(joined) else None
