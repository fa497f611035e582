"""Speed of the batches that training reads, and how much padding they carry, against plain ones.

Plain is what the published code keeps and does: per token a list of ids and a list of logits, read as JSON; dialogues
in random order, four to a batch, padded with `pad_sequence`; their softmax in a dense target [B, T, V], or sparse.
Dialogues are the given texts, cut anew to log-normal lengths of at most 2,048 tokens, as chats have them; rows are
those of a trigram model.
Array legend: N tokens of a dialogue, R rows; tensors B dialogues, T tokens, K candidates, V vocabulary.
"""

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import RESULTS, Row, inputs, interleaved, parser, report, seconds
from plausible_rows import trigram_dialogues
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from fusion.dialogues.encode import Encoded
from fusion.objective.fuse import FusedDialogue
from fusion.objective.fused_store import FusedStore
from fusion.objective.target_form import TargetForm
from fusion.teaching.sparse_rows import gather_entries
from fusion.teaching.teacher_rows import TeacherRows
from fusion.training.data import Steps
from fusion.training.micro_batches import Limits
from fusion.training.sampler import BatchPlan, make_plan

BATCH_SIZE, EPOCHS = 128, 4
PLAIN_BATCH = 4
"""Dialogues of a micro-batch in the published recipe."""
BUDGET = 8192
"""Tokens of a micro-batch of ours."""
DENSE_BATCHES = 8
RANDOM_READS = 256
LONGEST = 2048
WORKERS = (0, 1, 2)


class Plain:
    """Dialogues as JSON lines, found by their offsets."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            self.offsets = np.cumsum([0, *map(len, file)]).tolist()

    def __getitem__(self, number: int) -> dict[str, Any]:
        with self.path.open("rb") as file:
            file.seek(self.offsets[number])
            return json.loads(file.read(self.offsets[number + 1] - self.offsets[number]))


def main() -> None:
    chosen = parser(__doc__ or "").parse_args()
    torch.set_num_threads(1)
    given = inputs(chosen.data)
    texts = chat_texts([given.pivot(text).input_ids for text in given.texts])
    with tempfile.TemporaryDirectory() as folder:
        said = trigram_dialogues(texts)
        store = write_store(Path(folder) / "store", texts, said)
        plain = write_plain(Path(folder) / "plain.jsonl", texts, said)
        plan = make_plan(store.lengths, BATCH_SIZE, EPOCHS, 0, 1)
        rows = [*padding_rows(store.lengths, plan), size_row(store, plain), *access_rows(store, plain)]
        rows += loading_rows(store, plain, plan, len(given.pivot))
    facts = {"dialogues": len(texts), "tokens": int(store.lengths.sum()), "median": int(np.median(store.lengths))}
    report("Loading batches", rows, chosen.out or RESULTS / "data_loading.json", dialogues=facts)


def chat_texts(texts: Sequence[Sequence[int]]) -> list[list[int]]:
    """All tokens, cut to log-normal lengths: median 330, a tenth above 1,000."""
    tokens = list(chain.from_iterable(texts))
    draw = np.random.default_rng(0)
    lengths = draw.lognormal(5.8, 0.9, len(tokens) // 16).astype(int).clip(16, LONGEST)
    ends = np.cumsum(lengths)
    ends = ends[ends <= len(tokens)]
    return [tokens[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def write_store(folder: Path, texts: Sequence[Sequence[int]], said: Sequence[TeacherRows]) -> FusedStore:
    folder.mkdir()
    names = [sha256(str(number).encode()).hexdigest()[:32] for number in range(len(texts))]
    encoded = {name: encoded_text(text) for name, text in zip(names, texts, strict=True)}
    fused = {name: fused_rows(rows) for name, rows in zip(names, said, strict=True)}
    FusedStore.write(folder, encoded, fused, names, {}, TargetForm())
    return FusedStore(folder)


def encoded_text(text: Sequence[int]) -> Encoded:
    """Every token from the third on is supervised: for these the trigram model has rows."""
    ids_N = np.asarray(text, dtype=np.int32)
    return Encoded(ids_N, np.arange(len(ids_N)) >= 2, np.zeros(len(ids_N), dtype=np.int64), 0, exact=True)


def fused_rows(rows: TeacherRows) -> FusedDialogue:
    num_rows, width = rows.ids_RK.shape
    row_E = np.repeat(np.arange(num_rows), width)
    kept = rows.ids_RK.ravel() >= 0
    targets = gather_entries(row_E[kept], rows.ids_RK.ravel()[kept], np.exp(rows.logprobs_RK).ravel()[kept], num_rows)
    return FusedDialogue(targets, "source", 0, {"source": float(num_rows)})


def write_plain(path: Path, texts: Sequence[Sequence[int]], said: Sequence[TeacherRows]) -> Plain:
    with path.open("w", encoding="utf-8") as file:
        for text, rows in zip(texts, said, strict=True):
            lists = {"ids": rows.ids_RK.tolist(), "logits": rows.logprobs_RK.astype(np.float64).round(4).tolist()}
            file.write(json.dumps({"tokens": list(text), **lists}) + "\n")
    return Plain(path)


def size_row(store: FusedStore, plain: Plain) -> Row:
    size = sum(path.stat().st_size for path in store.folder.iterdir())
    tokens = int(store.lengths.sum())
    return Row("size on the disk", plain.path.stat().st_size / tokens, size / tokens, "bytes/token")


def padding_rows(lengths: np.ndarray, plan: BatchPlan) -> Iterator[Row]:
    """What a model has to read for every token of the dialogues."""
    orders = [np.random.default_rng(seed).permutation(len(lengths)) for seed in range(EPOCHS)]
    shuffled = [order[start : start + PLAIN_BATCH] for order in orders for start in range(0, len(order), PLAIN_BATCH)]
    random = sum(len(part) * int(lengths[part].max()) for part in shuffled)
    total = EPOCHS * int(lengths.sum())
    for packed in (False, True):
        limits = Limits(tokens=BUDGET, packed=packed)
        parts = [part for step in range(plan.total_steps) for part in plan.micro_batches(step, 1, 0, limits)]
        read = sum(limits.size(lengths[part].tolist()) for part in parts)
        label = "packed" if packed else "grouped by length"
        yield Row(f"tokens read per token, {label} : random order", random / total, read / total, "tokens")


def access_rows(store: FusedStore, plain: Plain) -> Iterator[Row]:
    places = np.random.default_rng(0).permutation(len(store))[:RANDOM_READS].tolist()
    times = interleaved(lambda: [plain[place] for place in places], lambda: [store[place] for place in places])
    reference, ours = (1e6 * time / len(places) for time in times)
    yield Row("a dialogue at random", reference, ours, "us")


def loading_rows(store: FusedStore, plain: Plain, plan: BatchPlan, vocabulary: int) -> Iterator[Row]:
    """Time per token; workers stay alive, so their start does not count."""
    tokens = EPOCHS * int(store.lengths.sum())
    order = np.random.default_rng(0).permutation(len(store))
    batches = [order[start : start + PLAIN_BATCH].tolist() for start in range(0, len(order), PLAIN_BATCH)]
    few = sum(int(store.lengths[batch].sum()) for batch in batches[:DENSE_BATCHES])
    sparse = 1e6 * seconds(lambda: [sparse_batch(plain, batch) for batch in batches], 2) / int(store.lengths.sum())
    dense_batches = partial(map, partial(dense_batch, plain, vocabulary), batches[:DENSE_BATCHES])
    dense = 1e6 * seconds(lambda: [None for _ in dense_batches()], 2) / few
    for packed in (False, True):
        steps = Steps(store, plan, 1, 0, Limits(tokens=BUDGET, packed=packed))
        for workers in WORKERS:
            loader = DataLoader(steps, batch_size=None, num_workers=workers, persistent_workers=workers > 0)
            assert sum(read_tokens(step) for step in loader) == tokens
            ours = 1e6 * seconds(lambda loader=loader: [None for _ in loader], 3) / tokens
            label = f"{'packed' if packed else 'padded'}, {workers} workers"
            yield Row(f"loading, {label} : JSON, sparse", sparse, ours, "us/token")
            if not workers:
                yield Row(f"loading, {label} : JSON, dense targets", dense, ours, "us/token")


def read_tokens(step: Any) -> int:
    return sum(int(batch.mask_BT.sum()) for batch in step.micro_batches)


def sparse_batch(plain: Plain, numbers: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [B, T] of dialogues, and ids and probabilities [B, T, K] of their candidates."""
    dialogues = [plain[number] for number in numbers]
    tokens, ids = ([torch.tensor(one[name]) for one in dialogues] for name in ("tokens", "ids"))
    probabilities = [torch.tensor(one["logits"]).softmax(-1) for one in dialogues]
    return tuple(pad_sequence(part, batch_first=True) for part in (tokens, ids, probabilities))


def dense_batch(plain: Plain, vocabulary: int, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Tokens [B, T], and target distributions [B, T, V]."""
    tokens_BT, ids_BTK, probabilities_BTK = sparse_batch(plain, numbers)
    targets_BTV = torch.zeros(*ids_BTK.shape[:2], vocabulary)
    return tokens_BT, targets_BTV.scatter_(-1, ids_BTK.clamp(min=0), probabilities_BTK)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
