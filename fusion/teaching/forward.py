"""Teacher forcing in length buckets: logits exist only for supervised rows, and only one chunk at a time.

Tensor legend: B dialogues, T tokens, H hidden size, V vocabulary, R supervised rows, K candidates.
"""

import copy
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from fusion.config import UserError
from fusion.config.schema import TeacherConfig
from fusion.dialogues.encode import Encoded
from fusion.teaching.causal_lm import final_hidden, has_plain_head, head, logits_device
from fusion.teaching.selection import joined, select, uniforms
from fusion.teaching.teacher_rows import TeacherRows

CHUNK_LOGITS = 8_000_000
"""Logits that exist at the same time: few chunks read the head's weights seldom, but blocks of more than 32 MiB, which
glibc maps afresh at every use, cost as much as the most likely tokens."""
ACCELERATOR_CHUNKS = 4
"""Chunks of the CPU that are one on an accelerator, where starting and waiting is what costs."""


def token_batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Group positions of `lengths` (ascending): a padded batch has at most `batch_tokens` tokens, or one dialogue."""
    batch: list[int] = []
    for position, length in enumerate(lengths):
        if batch and (len(batch) + 1) * length > batch_tokens:
            yield batch
            batch = []
        batch.append(position)
    if batch:
        yield batch


def pad(ids: Sequence[np.ndarray], device: torch.device) -> tuple[Tensor, Tensor]:
    """Right-pad to (ids_BT, mask_BT), int64; padding is id 0 under a zero mask."""
    width = max(len(row) for row in ids)
    ids_BT = np.zeros((len(ids), width), dtype=np.int64)
    mask_BT = np.zeros((len(ids), width), dtype=np.int64)
    for number, row in enumerate(ids):
        ids_BT[number, : len(row)] = row
        mask_BT[number, : len(row)] = 1
    return torch.from_numpy(ids_BT).to(device), torch.from_numpy(mask_BT).to(device)


def row_index(batch: Sequence[Encoded], width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Flat positions of supervised rows in a padded [B, T] batch, and the reference ids they predict: int64 [R]."""
    rows = [number * width + encoded.rows_R for number, encoded in enumerate(batch)]
    references = [encoded.ids_N[encoded.rows_R + 1] for encoded in batch]
    return (
        torch.from_numpy(np.concatenate(rows)).to(device),
        torch.from_numpy(np.concatenate(references).astype(np.int64)).to(device),
    )


class RowReader:
    """Hands out the logits of supervised rows of one model, chunk by chunk."""

    def __init__(self, model: PreTrainedModel, vocab_size: int) -> None:
        """Raises UserError for a model whose logits cannot be had of some rows alone."""
        self.model = model
        self.device = logits_device(model)
        self.vocab_size = vocab_size
        self._plain_head = has_plain_head(model)
        if not self._plain_head and not has_own_logits(model):
            raise UserError(
                f"{model.config.model_type} models: their logits cannot be computed row by row from their decoder's "
                "output, so they cannot teach; use a model of another architecture"
            )

    @torch.no_grad()
    def chunks(self, batch: Sequence[Encoded]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (logits_RV float32, references_R int64) over the supervised rows of `batch`, in order.

        Rows that a padded head has beyond the tokeniser's vocabulary are cut off.
        """
        ids_BT, mask_BT = pad([encoded.ids_N for encoded in batch], self.device)
        rows, references = row_index(batch, ids_BT.shape[1], self.device)
        logits_of = self._logits(ids_BT, mask_BT)
        size = max(8, CHUNK_LOGITS * (1 if self.device.type == "cpu" else ACCELERATOR_CHUNKS) // self.vocab_size)
        for start in range(0, len(rows), size):
            chosen = rows[start : start + size]
            yield logits_of(chosen)[:, : self.vocab_size].float(), references[start : start + size]

    def _logits(self, ids_BT: Tensor, mask_BT: Tensor) -> Callable[[Tensor], Tensor]:
        if self._plain_head:
            hidden = final_hidden(self.model, ids_BT, mask_BT).flatten(0, 1)
            return lambda rows: head(self.model)(hidden[rows])
        states = self.model.base_model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False)
        return lambda rows: own_logits(self.model, states, rows)


def own_logits(model: PreTrainedModel, states: ModelOutput, rows: Tensor) -> Tensor:
    """Logits [R, V] at flat positions `rows` of a decoder's output, by all that the model's own forward does to them.

    For models that scale or cap logits behind the head: their forward runs over a decoder that answers with the
    hidden states of these rows, as if they were one dialogue.
    """
    hidden = states["last_hidden_state"].flatten(0, 1)
    chosen = copy.copy(states)
    chosen["last_hidden_state"] = hidden[rows.to(hidden.device)].unsqueeze(0)
    ids_BT = torch.zeros(1, len(rows), dtype=torch.long, device=hidden.device)
    with _answering(model.base_model, chosen):
        return model(input_ids=ids_BT, use_cache=False).logits[0].to(rows.device)


@contextmanager
def _answering(decoder: torch.nn.Module, states: ModelOutput) -> Iterator[None]:
    """Let `decoder` say `states` whatever it is asked."""
    hooked = decoder.__dict__.get("forward")  # of the object alone: accelerate puts its hooks there
    decoder.forward = lambda *_, **__: states
    try:
        yield
    finally:
        del decoder.forward
        if hooked is not None:
            decoder.forward = hooked


@torch.no_grad()
def has_own_logits(model: PreTrainedModel) -> bool:
    """Whether `own_logits` are the logits of `model`: not if its forward asks for more than its decoder's output."""
    ids_BT = torch.arange(1, 9, device=logits_device(model)).reshape(2, 4)
    ids_BT %= int(model.config.get_text_config().vocab_size)
    asked = {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT), "use_cache": False}
    logits = model(**asked).logits.flatten(0, 1)
    rows = torch.arange(7, 0, -1, device=logits.device)
    ours = own_logits(model, model.base_model(**asked), rows)
    return torch.allclose(logits[rows].float(), ours.float(), rtol=1e-2, atol=1e-3, equal_nan=True)


def teacher_rows(
    reader: RowReader, batch: Sequence[Encoded], content_hashes: Sequence[str], settings: TeacherConfig
) -> list[TeacherRows]:
    """What is kept of the distributions of a batch (`settings.rows`), at `settings.temperature`; one per dialogue.

    The NLL of the reference is at temperature 1. `content_hashes` name the dialogues; draws depend on them.

    Raises:
        FloatingPointError: a row has NaN or infinite logits; the message names the dialogue.
    """
    bounds = np.cumsum([0, *(len(encoded.rows_R) for encoded in batch)]).tolist()
    draws = settings.draws if settings.rows == "random" else 0
    uniforms_RN = np.concatenate(
        [uniforms(name, b - a, draws) for name, (a, b) in zip(content_hashes, pairwise(bounds), strict=True)]
    )
    parts, nlls, start = [], [], 0
    for logits_RV, references_R in reader.chunks(batch):
        broken = _broken_rows(logits_RV)
        if len(broken):
            name = content_hashes[bisect_right(bounds, start + int(broken[0])) - 1]
            raise FloatingPointError(f"the model gives NaN or infinite logits in dialogue {name}")
        end = start + len(references_R)
        logprobs_RV = logits_RV.log_softmax(-1)
        nlls.append(-logprobs_RV.gather(1, references_R[:, None]).squeeze(1).cpu().numpy())
        if settings.temperature != 1:
            logprobs_RV = (logits_RV / settings.temperature).log_softmax(-1)
        parts.append(select(logprobs_RV, uniforms_RN[start:end], settings))
        del logits_RV, logprobs_RV  # or they would exist beside the next chunk's
        start = end
    nll_R = np.concatenate(nlls)
    ids_RK, logprobs_RK, tail_R = joined(parts)
    widths = np.maximum.reduceat((ids_RK >= 0).sum(1), bounds[:-1]).tolist()
    return [
        TeacherRows(ids_RK[a:b, :width], logprobs_RK[a:b, :width], tail_R[a:b], nll_R[a:b])
        for (a, b), width in zip(pairwise(bounds), widths, strict=True)
    ]


def _broken_rows(logits_RV: Tensor) -> Tensor:
    """Rows with NaN or infinite logits, in order.

    Their sums are no numbers either, and cost a thirtieth of a look at every logit; sums of others may overflow.
    """
    doubtful = torch.nonzero(~logits_RV.sum(-1).isfinite()).squeeze(1)
    return doubtful[~logits_RV[doubtful].isfinite().all(-1)]
