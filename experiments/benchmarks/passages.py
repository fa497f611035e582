"""Texts as both tokenisers of a benchmark read them, with distributions for the source's rows.

Array legend: N tokens, S source rows, K candidates.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from measure import Inputs

from fusion.alignment.pieces import Pieces
from fusion.alignment.vocabularies import VocabularyPair

CANDIDATES = 10


class Passage(NamedTuple):
    """One text as ids of both."""

    text: bytes
    pivot_ids: np.ndarray
    """int64 [N]."""
    source_ids: np.ndarray
    """int64 [S]."""


class Support(NamedTuple):
    """Candidates of every row of the source, most likely first."""

    ids_SK: np.ndarray
    """int64."""
    logits_SK: np.ndarray
    """float64; the masses of a row sum to less than 1."""


class Texts:
    """The dialogues of a benchmark, tokenised once."""

    def __init__(self, data: Inputs) -> None:
        self._tokenizers: tuple[Any, Any] = data.pivot, data.source
        self._strings = data.texts
        self.pair = VocabularyPair.of(*self._tokenizers)
        self.dialogues = [self._passage(text) for text in data.texts]
        self._pieces = tuple(map(Pieces, self._tokenizers))
        self._common_ids = np.unique(np.concatenate([passage.source_ids for passage in self.dialogues]))

    def passage(self, tokens: int) -> Passage:
        """As many dialogues as make about `tokens` tokens of the pivot, the last one cut."""
        taken: list[str] = []
        total = 0
        while total < tokens:
            for text, passage in zip(self._strings, self.dialogues, strict=True):
                share = min(1.0, (tokens - total) / len(passage.pivot_ids))
                taken.append(text[: max(1, round(share * len(text)))])
                total += len(passage.pivot_ids)
                if total >= tokens:
                    break
        return self._passage("\n".join(taken))

    def pieces(self, passage: Passage) -> tuple[list[str], list[str]]:
        """Decoded tokens of the source and of the pivot, as `dtw_path` takes them."""
        return self._pieces[1](passage.source_ids.tolist()), self._pieces[0](passage.pivot_ids.tolist())

    def support(self, passage: Passage, seed: int = 0) -> Support:
        """Distinct candidates that occur in the dialogues, among them the next token, with logits of a sharp model."""
        generator, size, known = np.random.default_rng(seed), len(passage.source_ids), len(self._common_ids)
        steps_SK = generator.integers(1, known // CANDIDATES, size=(size, CANDIDATES))
        places_SK = generator.integers(known, size=(size, 1)) + steps_SK.cumsum(axis=1)
        ids_SK = self._common_ids[places_SK % known]
        follows_S = np.append(passage.source_ids[1:], passage.source_ids[:1])
        is_next_SK = ids_SK == follows_S[:, None]
        ids_SK[np.arange(size), np.where(is_next_SK.any(axis=1), is_next_SK.argmax(axis=1), 0)] = follows_S
        masses_SK = generator.dirichlet(np.full(CANDIDATES + 1, 0.3), size)[:, :CANDIDATES] + 1e-9
        return Support(ids_SK, np.log(-np.sort(-masses_SK, axis=1)))

    def _passage(self, text: str) -> Passage:
        ids: Sequence[np.ndarray] = [
            np.array(tokenizer(text, add_special_tokens=False).input_ids, dtype=np.int64)
            for tokenizer in self._tokenizers
        ]
        return Passage(text.encode(), *ids)
