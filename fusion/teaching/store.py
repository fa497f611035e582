"""The distribution store: top-k next-token distributions of supervised rows, found by content hash.

Array legend: D dialogues of a shard, R supervised rows, K candidates.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from fusion.cache import file_hash, write_bytes, write_json
from fusion.config import UserError

INDEX = "index.json"


@dataclass(frozen=True)
class TeacherRows:
    """What one model says at the supervised rows of one dialogue."""

    ids_RK: np.ndarray
    """int32 candidate ids, most likely first."""
    logprobs_RK: np.ndarray
    """float32 log-probabilities of the candidates, in nats."""
    tail_R: np.ndarray
    """float32 probability mass outside the candidates."""
    nll_R: np.ndarray
    """float32 negative log-likelihood of the reference token, in nats."""


class DistributionStore:
    """A folder of shards and, once finished, an index with their checksums.

    A shard appears whole or not at all. Writers append shards in a fixed order, so that a killed pass goes on where it
    stopped and ends in the same bytes; readers ask by content hash.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._where: dict[str, tuple[str, int]] = {}
        self._shard = cache(self._open_shard)

    @classmethod
    def open(cls, folder: Path) -> "DistributionStore":
        """Open a finished store for reading; UserError when there is none."""
        store = cls(folder)
        if not (folder / INDEX).is_file():
            raise UserError(f"{folder}: no finished distribution store (its {INDEX} is missing)")
        store._where = {
            content_hash: (shard["file"], position)
            for shard in store._index()["shards"]
            for position, content_hash in enumerate(shard["dialogues"])
        }
        return store

    def has_shard(self, number: int) -> bool:
        return (self.folder / _shard_name(number)).is_file()

    def append(self, number: int, content_hashes: Sequence[str], rows: Sequence[TeacherRows]) -> None:
        """Write shard `number` atomically: the rows of one or more dialogues."""
        assert len(content_hashes) == len(rows) > 0
        counts_D = np.asarray([len(row.nll_R) for row in rows], dtype=np.int64)
        arrays = {
            "content_hash": np.frombuffer(bytes.fromhex("".join(content_hashes)), dtype=np.uint8).reshape(
                len(rows), -1
            ),
            "indptr": np.concatenate(([0], np.cumsum(counts_D))),
            "ids": np.concatenate([row.ids_RK for row in rows]).astype(np.int32),
            "logprobs": np.concatenate([row.logprobs_RK for row in rows]).astype(np.float16),
            "tail": np.concatenate([row.tail_R for row in rows]).astype(np.float32),
            "nll": np.concatenate([row.nll_R for row in rows]).astype(np.float32),
        }
        write_bytes(self.folder / _shard_name(number), save_arrays(arrays))

    def finish(self, description: Mapping[str, object]) -> None:
        """Write the index over all shards; `description` says what made them (model, top_k, temperature)."""
        shards = []
        for path in sorted(self.folder.glob("shard-*.safetensors")):
            arrays = load_arrays(path.read_bytes())
            shards.append(
                {
                    "file": path.name,
                    "sha256": file_hash(path),
                    "rows": int(arrays["indptr"][-1]),
                    "dialogues": [row.tobytes().hex() for row in arrays["content_hash"]],
                }
            )
        write_json(self.folder / INDEX, {"description": dict(description), "shards": shards})

    def verify(self) -> list[str]:
        """Re-hash every shard; return one sentence per shard that is missing or damaged."""
        problems = []
        for shard in self._index()["shards"]:
            path = self.folder / shard["file"]
            if not path.is_file():
                problems.append(f"{path}: the shard is missing")
            elif file_hash(path) != shard["sha256"]:
                problems.append(f"{path}: the shard's bytes are not what the index says; delete the store to redo it")
        return problems

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, content_hash: str) -> bool:
        return content_hash in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __getitem__(self, content_hash: str) -> TeacherRows:
        file, position = self._where[content_hash]
        shard, indptr = self._shard(file)
        rows = slice(int(indptr[position]), int(indptr[position + 1]))
        return TeacherRows(
            ids_RK=shard.get_slice("ids")[rows],
            logprobs_RK=shard.get_slice("logprobs")[rows].astype(np.float32),
            tail_R=shard.get_slice("tail")[rows],
            nll_R=shard.get_slice("nll")[rows],
        )

    def _open_shard(self, file: str) -> tuple[Any, np.ndarray]:
        """A shard opened for slices: dialogues are asked for in any order, so whole shards would be read in vain."""
        shard = safe_open(self.folder / file, framework="numpy")
        return shard, shard.get_tensor("indptr")

    def _index(self) -> dict:
        return json.loads((self.folder / INDEX).read_text("utf-8"))


def _shard_name(number: int) -> str:
    return f"shard-{number:06d}.safetensors"
