"""Size, accuracy and speed of the distribution stores against plain safetensors files of the same rows.

Plain: float32 log-probabilities and int64 ids, as top-k gives them; half: float16 and int32. Both keep tails and NLLs
in float32 and are read as slices of a mapped file, dialogue by dialogue, as the stores are.
"""

import os
import tempfile
from collections.abc import Iterator, Sequence
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from measure import RESULTS, Row, inputs, parser, report, seconds
from plausible_rows import trigram_dialogues, zipf_dialogues
from safetensors import safe_open
from safetensors.numpy import save_file

from fusion.teaching.store import CODINGS, DistributionStore
from fusion.teaching.teacher_rows import TeacherRows

SHARD_DIALOGUES = 512
RANDOM_READS = 512
DTYPES = {"plain": (np.float32, np.int64), "half": (np.float16, np.int32)}


class Measured(NamedTuple):
    bytes_per_row: float
    in_order: float
    """Microseconds per row."""
    at_random: float
    divergence: float


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--dialogues", type=int, default=1024, help="dialogues of every kind of rows")
    chosen = options.parse_args()
    rows, facts = [], {}
    for name, dialogues in _all_rows(chosen.data, chosen.dialogues):
        facts[name] = _facts(dialogues)
        print(name, facts[name], flush=True)
        with tempfile.TemporaryDirectory() as folder:
            plain = {kind: _measure_plain(dialogues, Path(folder) / "plain", kind) for kind in DTYPES}
            ours = {coding: _measure_store(dialogues, Path(folder) / coding, coding) for coding in CODINGS}
        rows += list(_compared(name, plain, ours))
    load = round(os.getloadavg()[0], 1)  # other work on the machine slows reads by up to a factor of three
    report("Distribution stores", rows, chosen.out or RESULTS / "store.json", rows_measured=facts, load_average=load)


def _all_rows(data: Path, dialogues: int) -> Iterator[tuple[str, list[TeacherRows]]]:
    given = inputs(data)
    for size, tokenizer in (("32k", given.pivot), ("151k", given.source)):
        ids = [tokenizer(text).input_ids for text in given.texts[:dialogues]]
        yield f"trigram {size}", trigram_dialogues(ids)
        yield f"zipf {size}", zipf_dialogues(len(tokenizer), dialogues)


def _facts(dialogues: Sequence[TeacherRows]) -> dict[str, float]:
    """What the rows are like, so that they can be compared with those of a real teacher."""
    ids = np.concatenate([one.ids_RK.ravel() for one in dialogues])
    shares = np.bincount(ids)[np.unique(ids)] / len(ids)
    first = np.exp(np.concatenate([one.logprobs_RK[:, 0] for one in dialogues]))
    tail = np.concatenate([one.tail_R for one in dialogues])
    nll = np.concatenate([one.nll_R for one in dialogues])
    return {
        "rows": len(first),
        "mean top-1 probability": round(float(first.mean()), 3),
        "mean tail": round(float(tail.mean()), 3),
        "mean NLL": round(float(nll.mean()), 3),
        "different candidates": len(shares),
        "bits per candidate (unigram entropy)": round(float(-(shares * np.log2(shares)).sum()), 2),
    }


def _compared(name: str, plain: dict[str, Measured], ours: dict[str, Measured]) -> Iterator[Row]:
    """Compact against both plain files, exact against the one that is exact too."""
    for coding, kind in (("compact", "plain"), ("compact", "half"), ("exact", "plain")):
        reference, measured = plain[kind], ours[coding]
        label = f"{name}, {coding} : {kind}"
        yield Row(f"{label}, size", reference.bytes_per_row, measured.bytes_per_row, "bytes/row")
        yield Row(f"{label}, in order", reference.in_order, measured.in_order, "us/row")
        yield Row(f"{label}, at random", reference.at_random, measured.at_random, "us/row")
        yield Row(f"{label}, KL", reference.divergence or None, measured.divergence, "nats/row")


def _measure_store(dialogues: Sequence[TeacherRows], folder: Path, coding: str) -> Measured:
    names = [sha256(str(number).encode()).hexdigest()[:32] for number in range(len(dialogues))]
    store = DistributionStore(folder, coding)
    for number, start in enumerate(range(0, len(names), SHARD_DIALOGUES)):
        end = start + SHARD_DIALOGUES
        store.append(number, names[start:end], dialogues[start:end])
    store.finish({})
    size = DistributionStore.open(folder).num_bytes
    assert DistributionStore.open(folder).verify() == []

    def in_order() -> None:
        opened = DistributionStore.open(folder)
        for name in names:
            opened[name]

    opened = DistributionStore.open(folder)
    decoded = [opened[name].logprobs_RK for name in names]
    return _measured(dialogues, size, in_order, lambda place: opened[names[place]], decoded)


def _measure_plain(dialogues: Sequence[TeacherRows], path: Path, kind: str) -> Measured:
    dtype, id_dtype = DTYPES[kind]
    arrays = {
        "ids": np.concatenate([one.ids_RK for one in dialogues]).astype(id_dtype),
        "logprobs": np.concatenate([one.logprobs_RK for one in dialogues]).astype(dtype),
        "tail": np.concatenate([one.tail_R for one in dialogues]),
        "nll": np.concatenate([one.nll_R for one in dialogues]),
    }
    bounds = np.cumsum([0, *(len(one.nll_R) for one in dialogues)]).tolist()
    save_file(arrays, path)

    def read(file: Any, place: int) -> list[np.ndarray]:
        return [file.get_slice(name)[bounds[place] : bounds[place + 1]] for name in arrays]

    def in_order() -> None:
        opened = safe_open(path, framework="numpy")
        for place in range(len(dialogues)):
            read(opened, place)

    opened = safe_open(path, framework="numpy")
    decoded = [arrays["logprobs"][a:b] for a, b in pairwise(bounds)]
    return _measured(dialogues, path.stat().st_size, in_order, lambda place: read(opened, place), decoded)


def _measured(
    dialogues: Sequence[TeacherRows], size: int, in_order: Any, read: Any, decoded: Sequence[np.ndarray]
) -> Measured:
    num_rows = sum(len(one.nll_R) for one in dialogues)
    places = np.random.default_rng(0).permutation(len(dialogues))[:RANDOM_READS].tolist()
    random_rows = sum(len(dialogues[place].nll_R) for place in places)
    at_random = seconds(lambda: [read(place) for place in places], 5)
    divergence = sum(map(_divergence, [one.logprobs_RK for one in dialogues], decoded)) / num_rows
    return Measured(size / num_rows, seconds(in_order, 9) / num_rows * 1e6, at_random / random_rows * 1e6, divergence)


def _divergence(exact_RK: np.ndarray, decoded_RK: np.ndarray) -> float:
    """Summed KL of rows scaled to 1."""
    exact, decoded = (np.exp(rows, dtype=np.float64) for rows in (exact_RK, decoded_RK))
    exact, decoded = exact / exact.sum(1, keepdims=True), decoded / decoded.sum(1, keepdims=True)
    held = exact > 0
    return float((exact[held] * np.log(exact[held] / decoded[held])).sum())


if __name__ == "__main__":
    main()
