"""Teacher forcing in length buckets: logits exist only for supervised rows, and only one chunk at a time.

Tensor legend: B dialogues, T tokens, H hidden size, V vocabulary, R supervised rows, K candidates.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fusion.dialogues.encode import Encoded
from fusion.teaching.causal_lm import final_hidden, has_plain_head, head
from fusion.teaching.store import TeacherRows

CHUNK_LOGITS = 1 << 22
"""Logits that exist at the same time; fresh memory is what costs on a CPU."""


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
        self.model = model
        self.device = next(model.parameters()).device
        self.vocab_size = vocab_size
        self._plain_head = has_plain_head(model)

    @torch.no_grad()
    def chunks(self, batch: Sequence[Encoded]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (logits_RV float32, references_R int64) over the supervised rows of `batch`, in order.

        Rows that a padded head has beyond the tokeniser's vocabulary are cut off.
        """
        ids_BT, mask_BT = pad([encoded.ids_N for encoded in batch], self.device)
        rows, references = row_index(batch, ids_BT.shape[1], self.device)
        logits_of = self._logits(ids_BT, mask_BT)
        size = max(8, CHUNK_LOGITS // self.vocab_size)
        for start in range(0, len(rows), size):
            chosen = rows[start : start + size]
            yield logits_of(chosen)[:, : self.vocab_size].float(), references[start : start + size]

    def _logits(self, ids_BT: Tensor, mask_BT: Tensor) -> Callable[[Tensor], Tensor]:
        if self._plain_head:
            hidden = final_hidden(self.model, ids_BT, mask_BT).flatten(0, 1)
            return lambda rows: head(self.model)(hidden[rows])
        logits = self.model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits.flatten(0, 1)
        return lambda rows: logits[rows]


def teacher_rows(reader: RowReader, batch: Sequence[Encoded], top_k: int, temperature: float) -> list[TeacherRows]:
    """Top-k distributions of a batch at `temperature`; the NLL of the reference is at temperature 1.

    Raises:
        FloatingPointError: a row has NaN or infinite logits; the message gives the dialogue's place in the batch.
    """
    parts: list[tuple[np.ndarray, ...]] = []
    for logits_RV, references_R in reader.chunks(batch):
        if not bool(torch.isfinite(logits_RV).all()):
            raise FloatingPointError("the model gives NaN or infinite logits")
        nll_R = torch.nn.functional.cross_entropy(logits_RV, references_R, reduction="none")
        logprobs_RK, ids_RK = (logits_RV / temperature).log_softmax(-1).topk(min(top_k, logits_RV.shape[-1]))
        tail_R = (1 - logprobs_RK.exp().sum(-1)).clamp(min=0)
        parts.append(tuple(part.cpu().numpy() for part in (ids_RK.int(), logprobs_RK, tail_R, nll_R)))
    ids, logprobs, tail, nll = (np.concatenate(column) for column in zip(*parts, strict=True))
    bounds = np.cumsum([0, *(len(encoded.rows_R) for encoded in batch)])
    return [TeacherRows(ids[a:b], logprobs[a:b], tail[a:b], nll[a:b]) for a, b in pairwise(bounds)]
