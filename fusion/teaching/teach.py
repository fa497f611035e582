"""The teacher pass of one model over all dialogues, cached by what it depends on, resumed and shared by shard."""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from itertools import chain
from pathlib import Path

import torch

from fusion.cache import Pieces, code_version, make_share, shared_folder
from fusion.config import UserError
from fusion.config.schema import ModelConfig, TeacherConfig
from fusion.dialogues.encode import Encoded, corpus_hash
from fusion.teaching.causal_lm import embedding_rows
from fusion.teaching.forward import RowReader, teacher_rows, token_batches
from fusion.teaching.placement import check_placement, is_split, place
from fusion.teaching.processes import Shard, read_in_processes
from fusion.teaching.shards import has_shard, read_index
from fusion.teaching.store import DistributionStore

log = logging.getLogger(__name__)

STAGE = "teaching"
SHARDS_OF_PROCESSES = 256
"""Shards that one start of several processes reads at most: starting them costs as much as reading a few shards."""


@dataclass(frozen=True)
class Share:
    """What one worker did for one model."""

    name: str
    """The model's."""
    shards: int
    """Shards of the worker."""
    all_shards: int
    rows: int
    """Supervised rows in the worker's shards."""
    store: str | None
    """Folder of the finished store; None while shards of other workers are missing."""


def teach(
    model: ModelConfig,
    model_hash: str,
    vocab_size: int,
    encoded: Mapping[str, Encoded],
    settings: TeacherConfig,
    cache: Path,
) -> DistributionStore:
    """Return the store of what `model` says about `encoded` (content hash -> tokens), reading each dialogue once.

    `vocab_size` is the tokeniser's; `model_hash` names the weights. Shards are runs of dialogues in the order of
    (length, hash), so their bytes do not depend on the order in which dialogues came, nor on who read them, nor on
    where a pass was killed. Shards that another process reads at this moment are waited for.

    Raises:
        UserError: the model cannot be loaded, does not fit, or gives no numbers; or the finished store lacks bytes.
    """
    work = _Pass(model, vocab_size, encoded, settings)
    folder = shared_folder(cache, STAGE, work.key(model_hash), work.pieces)
    _check_sizes(folder)
    return DistributionStore.open(folder)


def teach_share(
    model: ModelConfig,
    model_hash: str,
    vocab_size: int,
    encoded: Mapping[str, Encoded],
    settings: TeacherConfig,
    cache: Path,
) -> Share:
    """Read the shards of worker `settings.worker` only: those whose number leaves it as rest by `settings.workers`.

    Whoever finds that the last shard is there finishes the store. Raises as `teach` does.
    """
    assert settings.worker is not None
    work = _Pass(model, vocab_size, encoded, settings)
    mine = range(settings.worker, len(work.shards), settings.workers)
    folder = make_share(cache, STAGE, work.key(model_hash), work.pieces, mine)
    rows = sum(len(one.rows_R) for number in mine for _, one in work.shards[number][1])
    return Share(model.name, len(mine), len(work.shards), rows, str(folder) if folder else None)


@dataclass(frozen=True)
class _Pass:
    """One model and the dialogues it reads, in shards."""

    model: ModelConfig
    vocab_size: int
    encoded: Mapping[str, Encoded]
    settings: TeacherConfig

    def key(self, model_hash: str) -> dict[str, object]:
        """What the bytes of the store depend on: not the workers, and not the device (rounding apart)."""
        settings = self.settings
        kept: dict[str, dict[str, object]] = {
            "top_k": {"top_k": settings.top_k},
            "nucleus": {"top_k": settings.top_k, "top_p": settings.top_p},
            "random": {"draws": settings.draws},
        }
        key: dict[str, object] = {
            "model": model_hash,
            "vocab_size": self.vocab_size,
            "dtype": self.model.dtype,
            "rows": {"kind": settings.rows, **kept[settings.rows]},
            "temperature": settings.temperature,
            "store": settings.store,
            "batch_tokens": settings.batch_tokens,
            "shard_dialogues": settings.shard_dialogues,
            "threads": torch.get_num_threads(),
            "dialogues": corpus_hash(self.encoded),
            "code": code_version("fusion.teaching"),
        }
        if settings.placement != "single":  # sums in another order: the last bits may differ
            key |= {"placement": settings.placement, "processes": settings.processes}
        return key

    @cached_property
    def shards(self) -> list[Shard]:
        size = self.settings.shard_dialogues
        order = sorted(self.encoded, key=lambda name: (len(self.encoded[name].ids_N), name))
        runs = (order[start : start + size] for start in range(0, len(order), size))
        return [(number, [(name, self.encoded[name]) for name in run]) for number, run in enumerate(runs)]

    @property
    def pieces(self) -> Pieces:
        return Pieces(
            count=len(self.shards),
            is_there=has_shard,
            make=self._read,
            finish=self._finish,
            at_once=SHARDS_OF_PROCESSES if is_split(self.settings) else 1,
        )

    def _read(self, folder: Path, claims: Iterator[list[int]]) -> None:
        check_placement(self.settings)
        if is_split(self.settings):
            for numbers in claims:
                wanted = [self.shards[number] for number in numbers]
                read_in_processes(folder, self.model, self.vocab_size, self.settings, wanted)
        elif (first := next(claims, None)) is not None:
            self._read_here(folder, chain([first], claims))

    def _read_here(self, folder: Path, claims: Iterable[list[int]]) -> None:
        """Read in this process; the model is loaded, so there should be something to read."""
        store = DistributionStore(folder, self.settings.store)
        reader = RowReader(place(self.model, self.settings), self.vocab_size)
        progress = _Progress(self.model.name, [_num_tokens(shard) for _, shard in self.shards], self._missing(folder))
        for number in chain.from_iterable(claims):
            write_shard(store, number, reader, self.shards[number][1], self.settings, self.model.name)
            progress.tell(number, self._missing(folder))

    def _missing(self, folder: Path) -> list[int]:
        return [number for number in range(len(self.shards)) if not has_shard(folder, number)]

    def _finish(self, folder: Path) -> None:
        """Write the index, with what the store tells of itself."""
        settings = self.settings
        candidates = {"draws": settings.draws} if settings.rows == "random" else {"top_k": settings.top_k}
        description = {"model": self.model.name, "temperature": settings.temperature, "rows": settings.rows}
        DistributionStore(folder, settings.store).finish({**description, **candidates})


class _Progress:
    """Speed of this process, and how long it takes until all shards are there if all go on as they did."""

    def __init__(self, name: str, shard_tokens: Sequence[int], missing: Sequence[int]) -> None:
        self.name = name
        self.shard_tokens = shard_tokens
        self.tokens = 0
        self.missing_tokens = self._total(missing)
        self.started = time.perf_counter()

    def tell(self, number: int, missing: Sequence[int]) -> None:
        """Log that shard `number` is done and that `missing` are not."""
        seconds = time.perf_counter() - self.started
        self.tokens += self.shard_tokens[number]
        left = self._total(missing)
        speed_of_all = max(self.missing_tokens - left, self.tokens) / seconds
        done, count = len(self.shard_tokens) - len(missing), len(self.shard_tokens)
        to_go = timedelta(seconds=round(left / speed_of_all))
        speed = self.tokens / seconds
        log.info("teacher %s: %d of %d shards, %.0f tokens/s, %s left", self.name, done, count, speed, to_go)

    def _total(self, numbers: Sequence[int]) -> int:
        return sum(self.shard_tokens[number] for number in numbers)


def _num_tokens(shard: Sequence[tuple[str, Encoded]]) -> int:
    return sum(len(encoded.ids_N) for _, encoded in shard)


def write_shard(
    store: DistributionStore,
    number: int,
    reader: RowReader,
    shard: Sequence[tuple[str, Encoded]],
    settings: TeacherConfig,
    name: str,
) -> None:
    """Read the dialogues of `shard` and append them to `store`; `settings` and `name` are the teacher's.

    Raises:
        UserError: token ids that the model does not have, logits that are no numbers, or memory that ran out.
    """
    rows = []
    for positions in token_batches([len(encoded.ids_N) for _, encoded in shard], settings.batch_tokens):
        batch = [shard[position][1] for position in positions]
        _check_ids(batch, reader, name)
        try:
            rows += teacher_rows(reader, batch, [shard[position][0] for position in positions], settings)
        except FloatingPointError as error:
            raise UserError(f"teacher {name}: {error}") from error
        except torch.OutOfMemoryError as error:
            longest = max(len(encoded.ids_N) for encoded in batch)
            raise UserError(_memory_hint(name, reader, settings, len(batch), longest)) from error
    store.append(number, [content_hash for content_hash, _ in shard], rows)


def _memory_hint(name: str, reader: RowReader, settings: TeacherConfig, dialogues: int, longest: int) -> str:
    dtype = str(next(reader.model.parameters()).dtype).removeprefix("torch.")
    return (
        f"teacher {name}: the device's memory does not hold a batch of {dialogues} dialogues of up to {longest} "
        f"tokens; lower teacher.batch_tokens (now {settings.batch_tokens}), choose a smaller dtype for the model "
        f"(pivot.dtype or source.dtype, now {dtype}), or spread it: teacher.placement=auto (now "
        f"{settings.placement}). What was read is kept"
    )


def _check_ids(batch: Sequence[Encoded], reader: RowReader, name: str) -> None:
    rows = embedding_rows(reader.model)
    highest = max(int(encoded.ids_N.max()) for encoded in batch)
    if highest >= rows:
        raise UserError(
            f"teacher {name}: its tokeniser has token {highest}, but the model embeds only {rows} tokens; "
            "the tokeniser does not belong to this model"
        )


def _check_sizes(folder: Path) -> None:
    """Refuse a store of which files were lost or cut since it was finished; their bytes are checked when read."""
    wrong = []
    for entry in read_index(folder).shards:
        file = folder / entry.file
        size = file.stat().st_size if file.is_file() else 0
        if size != entry.bytes:
            wrong.append(f"{file}: {size} bytes instead of {entry.bytes}; delete {folder} to make it again")
    if wrong:
        raise UserError(wrong)
