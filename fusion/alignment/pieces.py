"""Tokens as the strings that the published method compares: decoded one by one, space markers and all."""

from collections.abc import Iterable
from typing import Any


class Pieces:
    """`decode([id])` of one tokeniser, each id decoded once."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._decoded: dict[int, str] = {}

    def __call__(self, ids: Iterable[int]) -> list[str]:
        return [self[token] for token in ids]

    def __getitem__(self, token: int) -> str:
        piece = self._decoded.get(token)
        if piece is None:
            piece = self._decoded[token] = str(self._tokenizer.decode([token]))
        return piece
