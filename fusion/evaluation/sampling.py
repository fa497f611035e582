"""Answers of a transformers model, side by side: left-padded, each with its own random numbers.

Tensor legend: B dialogues, T tokens, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from fusion.teaching.causal_lm import logits_device


@dataclass(frozen=True)
class Draw:
    """How one answer is drawn."""

    temperature: float
    """0 takes the most likely token."""
    seed: int

    @classmethod
    def named(cls, temperature: float, *parts: object) -> "Draw":
        """A draw whose random numbers depend on `parts` alone, not on what is generated beside it."""
        digest = sha256("\0".join(map(str, parts)).encode()).digest()
        return cls(temperature, int.from_bytes(digest[:7], "big"))


class _OwnNoise(LogitsProcessor):
    """Makes the most likely token of every row a draw from its distribution at its temperature.

    Exponential races: the largest of log p - log E, with E exponential, is token v with probability p(v). A generator
    per row keeps an answer the same whatever stands beside it in the batch.
    """

    def __init__(self, draws: Sequence[Draw]) -> None:
        self._draws = draws
        self._generators = [torch.Generator().manual_seed(draw.seed) for draw in draws]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        chosen = scores.float().clone()
        for row, (draw, generator) in enumerate(zip(self._draws, self._generators, strict=True)):
            if draw.temperature > 0:
                race_V = torch.empty(scores.shape[1]).exponential_(generator=generator).log().to(scores.device)
                chosen[row] = chosen[row] / draw.temperature - race_V
        return chosen  # type: ignore[return-value]


class _OnlyKnownTokens(LogitsProcessor):
    """Rows of a padded head that no token has are never chosen."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scores[:, self._vocab_size :] = -torch.inf
        return scores


def left_pad(prompts: Sequence[np.ndarray], device: torch.device) -> tuple[Tensor, Tensor]:
    """(ids_BT, mask_BT), int64; the prompts end side by side. Padding is id 0 under a zero mask."""
    width = max(map(len, prompts))
    ids_BT, mask_BT = np.zeros((2, len(prompts), width), dtype=np.int64)
    for row, prompt in enumerate(prompts):
        ids_BT[row, width - len(prompt) :] = prompt
        mask_BT[row, width - len(prompt) :] = 1
    return torch.from_numpy(ids_BT).to(device), torch.from_numpy(mask_BT).to(device)


@torch.no_grad()
def continuations(
    model: PreTrainedModel,
    vocab_size: int,
    prompts: Sequence[np.ndarray],
    draws: Sequence[Draw],
    stop_ids: Sequence[int],
    max_new_tokens: int,
    streamer: BaseStreamer | None = None,
) -> list[list[int]]:
    """New token ids of every prompt, up to the first of `stop_ids` (left out) or `max_new_tokens`.

    Nothing but `draws` decides how tokens are chosen: the model's own generation settings are put aside.
    """
    ids_BT, mask_BT = left_pad(prompts, logits_device(model))
    processors = LogitsProcessorList([_OnlyKnownTokens(vocab_size), _OwnNoise(draws)])
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=list(stop_ids), pad_token_id=stop_ids[0]
    )
    with _without_own_settings(model):
        written_BT = cast(Any, model).generate(
            ids_BT,
            attention_mask=mask_BT,
            generation_config=settings,
            logits_processor=processors,
            streamer=streamer,
        )
    return [_until_stop(row.tolist(), stop_ids) for row in written_BT[:, ids_BT.shape[1] :]]


@contextmanager
def _without_own_settings(model: PreTrainedModel) -> Iterator[None]:
    """transformers fills what a call leaves open from the model's own settings, a repetition penalty for instance."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _until_stop(ids: Sequence[int], stop_ids: Sequence[int]) -> list[int]:
    end = next((place for place, token in enumerate(ids) if token in stop_ids), len(ids))
    return list(ids[:end])


def stop_ids_of(model: PreTrainedModel, end_of_turn_id: int) -> list[int]:
    """The end-of-turn token first, then what the model's own settings call an end."""
    own = model.generation_config.eos_token_id if model.generation_config else None
    more = [own] if isinstance(own, int) else list(own or [])
    return list(dict.fromkeys([end_of_turn_id, *more]))
