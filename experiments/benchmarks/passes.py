"""A teacher with random weights, the dialogues it reads, and the passes over them that are compared.

Tensor legend: B dialogues, T tokens, V vocabulary, N tokens of a dialogue, R supervised rows.
"""

import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from measure import inputs
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from fusion.config.schema import ModelConfig, TeacherConfig
from fusion.dialogues.encode import Encoded, Encoder
from fusion.dialogues.template import chat_format
from fusion.dialogues.tokenizer import read_template
from fusion.teaching.causal_lm import head
from fusion.teaching.forward import RowReader, pad, token_batches
from fusion.teaching.placement import place
from fusion.teaching.processes import Shard
from fusion.teaching.store import DistributionStore
from fusion.teaching.teach import write_shard
from fusion.teaching.teacher_rows import TeacherRows

VOCABULARY = 32_000
HEAD_SIZE = 64
BASE: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12}
"""110 million parameters; the embedding, which is the head too, has 25 million of them."""
TINY: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
PARTS = ("decoder", "head", "store", "candidates")
"""Parts of a pass; candidates: log-softmax, NLL, the most likely tokens, and all the rest."""

Clock = Callable[[], np.ndarray]


class Corpus(NamedTuple):
    """Dialogues as the teacher reads them."""

    named: list[tuple[str, Encoded]]
    """With their content hashes, in the order of the file."""
    vocab_size: int
    origin: str

    @classmethod
    def of(cls, folder: Path) -> "Corpus":
        """All dialogues below `folder`, or made-up ones; a tokeniser without a chat template gets the plain one."""
        given = inputs(folder)
        given.pivot.chat_template = given.pivot.chat_template or read_template("plain", "pivot")
        encoder = Encoder(chat_format(given.pivot, "pivot"))
        named = {one.content_hash: encoder.encode(one) for one in given.dialogues}
        return cls(list(named.items()), max(VOCABULARY, len(given.pivot)), given.origin)

    def alike(self, count: int) -> list[tuple[str, Encoded]]:
        """`count` dialogues of about the median length: so little padding has a batch of a whole shard."""
        order = sorted(self.named, key=_length_and_name)
        first = max(0, (len(order) - count) // 2)
        return order[first : first + count]


def in_shards(named: Sequence[tuple[str, Encoded]], settings: TeacherConfig) -> list[Shard]:
    """Runs of dialogues of equal lengths, as the teacher pass reads them."""
    order = sorted(named, key=_length_and_name)
    size = settings.shard_dialogues
    return [(number, order[start : start + size]) for number, start in enumerate(range(0, len(order), size))]


def _length_and_name(one: tuple[str, Encoded]) -> tuple[int, str]:
    return len(one[1].ids_N), one[0]


def all_supervised(named: Sequence[tuple[str, Encoded]]) -> list[tuple[str, Encoded]]:
    """The same dialogues with a distribution wanted for every token: the most that a teacher can have to say."""
    return [(name, replace(one, supervised_N=np.ones_like(one.supervised_N))) for name, one in named]


def make_teacher(folder: Path, vocab_size: int, shape: dict[str, Any], device: str, dtype: str) -> RowReader:
    """Write a Llama with random weights to `folder`, and load it as a teacher is loaded."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        num_attention_heads=shape["hidden_size"] // HEAD_SIZE,
        head_dim=HEAD_SIZE,
        tie_word_embeddings=True,
        **shape,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return load_teacher(folder, vocab_size, device, dtype)


def load_teacher(folder: Path, vocab_size: int, device: str, dtype: str) -> RowReader:
    model = ModelConfig(name="teacher", path=str(folder), dtype=dtype)
    return RowReader(place(model, TeacherConfig(device=device)), vocab_size)


@dataclass(frozen=True)
class Reading:
    """Passes of one teacher over the same padded batches."""

    reader: RowReader
    shards: list[Shard]
    settings: TeacherConfig

    @cached_property
    def padded(self) -> list[tuple[Tensor, Tensor]]:
        """(ids_BT, mask_BT) of the batches that the teacher pass makes."""
        encoded = [[one for _, one in shard] for _, shard in self.shards]
        return [
            pad([shard[place].ids_N for place in places], self.reader.device)
            for shard in encoded
            for places in token_batches([len(one.ids_N) for one in shard], self.settings.batch_tokens)
        ]

    @property
    def tokens(self) -> int:
        """Tokens without padding."""
        return sum(len(one.ids_N) for _, shard in self.shards for _, one in shard)

    @property
    def rows(self) -> int:
        """Supervised rows."""
        return sum(len(one.rows_R) for _, shard in self.shards for _, one in shard)

    @torch.no_grad()
    def all_logits(self) -> None:
        """A bare forward: what the model's own forward gives, [B, T, V] logits, and nothing done with them."""
        for ids_BT, mask_BT in self.padded:
            self.reader.model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False)

    @torch.no_grad()
    def no_logits(self) -> None:
        """Hidden states alone: less than any teacher can do."""
        for ids_BT, mask_BT in self.padded:
            self.reader.model.base_model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False)

    def into_store(self, store_class: Callable[[Path, str], DistributionStore] = DistributionStore) -> None:
        """The teacher pass: into a finished store on the disk, which is deleted then."""
        with tempfile.TemporaryDirectory() as folder:
            store = store_class(Path(folder), self.settings.store)
            for number, shard in self.shards:
                write_shard(store, number, self.reader, shard, self.settings, "teacher")
            store.finish({})

    def parts(self, clock: Clock) -> dict[str, np.ndarray]:
        """What the parts of one teacher pass take, and all of it: [clocks] each."""
        laps = Laps(clock)
        model = self.reader.model
        with laps.of("all"), laps.of_module("decoder", model.base_model), laps.of_module("head", head(model)):
            self.into_store(partial(TimedStore, laps))
        others = sum(laps.spent[part] for part in PARTS if part != "candidates")
        return {**laps.spent, "candidates": laps.spent["all"] - others}


class Laps:
    """What was spent in parts of a run, by name."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.spent: defaultdict[str, Any] = defaultdict(float)

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """The time of the block."""
        started = self.clock()
        yield
        self.spent[name] += self.clock() - started

    @contextmanager
    def of_module(self, name: str, module: torch.nn.Module) -> Iterator[None]:
        """The time in which `module` computes during the block."""
        begun: list[np.ndarray] = []
        begin = module.register_forward_pre_hook(lambda *_: begun.append(self.clock()))
        end = module.register_forward_hook(lambda *_: self._add(name, begun.pop()))
        yield
        begin.remove()
        end.remove()

    def _add(self, name: str, started: np.ndarray) -> None:
        self.spent[name] += self.clock() - started


class TimedStore(DistributionStore):
    """A store whose writing is timed."""

    def __init__(self, laps: Laps, folder: Path, coding: str) -> None:
        super().__init__(folder, coding)
        self._laps = laps

    def append(self, number: int, content_hashes: Sequence[str], rows: Sequence[TeacherRows]) -> None:
        with self._laps.of("store"):
            super().append(number, content_hashes, rows)

    def finish(self, description: Mapping[str, object]) -> None:
        with self._laps.of("store"):
            super().finish(description)


def clocks(device: torch.device) -> np.ndarray:
    """Seconds of this thread and of the wall; an accelerator is waited for."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return np.array([time.thread_time(), time.perf_counter()])
