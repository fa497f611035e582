"""One of the processes that read together: `torch.distributed.run ... -m fusion.teaching.distributed FOLDER`.

Under tensor parallelism all processes read all shards, and the first one writes them. Under FSDP the shards are dealt
out, and every process writes its own; one that has finished goes on with passes whose result nobody wants, because
the others need its part of the weights.
"""

import os
import sys
import tempfile
from pathlib import Path

import torch

from fusion.config import UserError
from fusion.processes.member import take_part
from fusion.processes.starter import PROGRESS
from fusion.teaching.forward import RowReader, token_batches
from fusion.teaching.placement import load_split
from fusion.teaching.processes import Shard, Task
from fusion.teaching.store import DistributionStore
from fusion.teaching.teach import write_shard


def main(handover: Path) -> None:
    """Read the task in `handover`; a failure is told in a file there."""
    task = Task.load(handover)
    take_part(handover, task.teacher.processes, lambda: _read(task, int(os.environ["RANK"])))


def _read(task: Task, rank: int) -> None:
    torch.set_num_threads(task.threads)
    reader = _reader(task)
    if task.teacher.placement == "fsdp":
        _read_own(task, rank, reader)
    else:
        _read_all(task, rank, reader)
    torch.distributed.barrier()


def _reader(task: Task) -> RowReader:
    """A reader of this process's part of the model; its first pass shows whether the model can be split so."""
    model = load_split(task.model, task.teacher)
    try:
        return RowReader(model, task.vocab_size)
    except RuntimeError as error:
        if task.teacher.placement == "fsdp" or isinstance(error, torch.OutOfMemoryError):
            raise
        config = model.config.get_text_config().to_dict()
        heads = [f"{key}={config[key]}" for key in ("num_attention_heads", "num_key_value_heads") if key in config]
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"teacher {task.model.name}: tensor_parallel over {task.teacher.processes} processes fails: {reason}; "
            f"teacher.processes has to divide the model's heads ({', '.join(heads)}), or use teacher.placement=fsdp"
        ) from error


def _read_all(task: Task, rank: int, reader: RowReader) -> None:
    """Every process computes every shard; the first one keeps it."""
    with tempfile.TemporaryDirectory() as thrown_away:
        store = DistributionStore(task.folder if rank == 0 else Path(thrown_away), task.teacher.store)
        for count, shard in enumerate(task.shards, 1):
            _write(task, store, reader, shard)
            if rank == 0:
                _tell(task, count)


def _read_own(task: Task, rank: int, reader: RowReader) -> None:
    """Compute and keep every n-th shard, then take part in as many passes as the busiest process."""
    size = task.teacher.processes
    passes = [sum(_num_passes(task, shard) for shard in task.shards[other::size]) for other in range(size)]
    store = DistributionStore(task.folder, task.teacher.store)
    for count, shard in enumerate(task.shards[rank::size], 1):
        _write(task, store, reader, shard)
        if rank == 0:
            _tell(task, min(count * size, len(task.shards)))
    shortest = task.shards[0][1][0][1]
    for _ in range(max(passes) - passes[rank]):
        for _ in reader.chunks([shortest]):
            pass


def _num_passes(task: Task, shard: Shard) -> int:
    return sum(1 for _ in token_batches([len(one.ids_N) for _, one in shard[1]], task.teacher.batch_tokens))


def _write(task: Task, store: DistributionStore, reader: RowReader, shard: Shard) -> None:
    number, dialogues = shard
    write_shard(store, number, reader, dialogues, task.teacher, task.model.name)


def _tell(task: Task, count: int) -> None:
    print(f"{PROGRESS}teacher {task.model.name}: {count} of {len(task.shards)} shards", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
