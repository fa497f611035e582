"""SIGKILL at any moment: what was finished stays, nothing is half there, and the end is the same to the byte.

Children are forked from this process, so that the imports are paid once.
"""

import os
import random
from dataclasses import replace
from functools import partial
from signal import SIGALRM

import pytest
from forked import doom, ended, file_events, fork, killed
from tiny_models import encoder

from fusion.alignment.pair import align_pair
from fusion.config.schema import AlignmentConfig, TeacherConfig
from fusion.dialogues.dialogue import chat
from fusion.dialogues.reader import encode_all, make_readers
from fusion.teaching.store import DistributionStore
from fusion.teaching.teach import teach, teach_share

KILLS = 20
TEACHER = TeacherConfig(top_k=4, batch_tokens=64, shard_dialogues=3, device="cpu")


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def dialogues():
    made = [chat(f"question {n}", "yes " * (1 + n % 6), "and?", f"no {n}") for n in range(120)]
    return {one.content_hash: encoder("metaspace", "openchat").encode(one) for one in made}


@pytest.fixture
def read(tiny_pivot, dialogues):
    vocab_size = len(encoder("metaspace", "openchat").own.tokenizer)

    def of(cache, settings=TEACHER):
        work = teach if settings.worker is None else teach_share
        return work(tiny_pivot, "weights", vocab_size, dialogues, settings, cache)

    return of


@pytest.fixture
def whole(read, tmp_path):
    """The bytes of a pass that nobody disturbed."""
    return content(read(tmp_path / "whole").folder)


def check_building(cache, whole):
    """Shards of an unfinished store are whole; return how many there are, all of them when it is finished."""
    (folder,) = (path for path in (cache / "teaching").iterdir() if path.is_dir() and path.suffix != ".locks")
    shards = {path.name: path.read_bytes() for path in folder.glob("shard-*")}
    assert shards.items() <= whole.items()
    return len(shards)


def test_a_teacher_pass_that_is_killed_again_and_again(read, whole, tmp_path, monkeypatch):
    """Every pass goes on where the last one was killed, until the store is finished; then a new one is begun."""
    events = file_events(lambda: read(tmp_path / "counted"))
    append, pipe = DistributionStore.append, os.pipe()

    def tells(self, number, names, rows):
        append(self, number, names, rows)
        os.write(pipe[1], b".")

    monkeypatch.setattr(DistributionStore, "append", tells)
    os.set_blocking(pipe[0], False)
    moments, number, kills, told = random.Random(0), 0, 0, 0
    unfinished = set()
    while kills < KILLS:
        cache = tmp_path / str(number)
        (cache / "teaching").mkdir(parents=True, exist_ok=True)
        (cache / "teaching" / "none.building").mkdir(exist_ok=True)
        (cache / "teaching" / "none.building").rmdir()
        if not killed(lambda cache=cache: read(cache), moments, int(0.8 * events)):
            number, told = number + 1, 0
            drain(pipe[0])
            continue
        kills += 1
        told += drain(pipe[0])
        if any((cache / "teaching").glob(".*.building")):
            there = check_building(cache, whole)
            assert there >= told  # what append returned from is never lost
            unfinished.add(there)
    assert len(unfinished) > 3  # kills did come at different moments
    for cache in map(str, range(number + 1)):
        assert content(read(tmp_path / cache).folder) == whole
    assert not list(tmp_path.rglob("*.tmp"))


def drain(pipe):
    """Bytes that wait in a pipe."""
    try:
        return len(os.read(pipe, 1 << 16))
    except BlockingIOError:
        return 0


def test_workers_that_are_killed_stop_nobody(read, whole, tmp_path):
    """Three workers at once, one of them killed; the others end, and a job without a share reads the rest."""
    settings = [replace(TEACHER, workers=3, worker=worker) for worker in range(3)]
    events = file_events(lambda: read(tmp_path / "counted", settings[0]))

    def work(cache, worker, moment):
        if moment is not None:
            doom(moment, 0)
        read(cache, settings[worker])

    for attempt, share in enumerate((0.1, 0.4, 0.6)):
        cache = tmp_path / str(attempt)
        moments = [int(share * events) if worker == attempt else None for worker in range(3)]
        children = [fork(partial(work, cache, worker, moment)) for worker, moment in enumerate(moments)]
        assert ended(children[attempt]) == -SIGALRM
        others = [ended(child) for place, child in enumerate(children) if place != attempt]
        assert others == [0, 0]
        assert check_building(cache, whole) >= 2 * 40 // 3
        assert content(read(cache).folder) == whole


def test_jobs_that_want_the_same_store_at_once_write_it_once(read, whole, tmp_path):
    children = [fork(lambda: read(tmp_path / "same")) for _ in range(3)]
    assert [ended(child) for child in children] == [0, 0, 0]
    assert content(read(tmp_path / "same").folder) == whole


ALIGNMENT = AlignmentConfig(name="ms", shard_dialogues=3, dtw_sample=40)


@pytest.fixture
def align(tiny_pivot, tiny_source, tmp_path):
    """Aligns 120 taught dialogues in a cache of the caller's; statistics and the comparison of paths included."""
    made = [chat(f"question {n}", "yes, the ratio " * (1 + n % 6), "and?", f"no {n}") for n in range(120)]
    readers = make_readers([tiny_pivot, tiny_source], "shared")
    tokens, dropped = encode_all(readers, made)
    assert not dropped
    source = teach(tiny_source, "weights", readers[1].vocab_size, tokens[1], TEACHER, tmp_path / "taught")
    names = [one.content_hash for one in made]
    return lambda cache: align_pair(*readers, *tokens, source, names, ALIGNMENT, cache)


def finished_files(cache):
    """Bytes of all finished folders below a cache, by path."""
    found = (path for path in cache.rglob("*") if path.is_file())
    paths = {path.relative_to(cache): path for path in found}
    return {name: path.read_bytes() for name, path in paths.items() if not any(p[0] == "." for p in name.parts)}


def test_an_alignment_that_is_killed_again_and_again(align, tmp_path):
    """Kills come while pairs are counted, while rows are mapped, and while paths are compared."""
    events = file_events(lambda: align(tmp_path / "counted"))
    align(tmp_path / "whole")
    whole = finished_files(tmp_path / "whole")
    assert {name.parts[0] for name in whole} == {"alignment", "statistics", "paths"}
    moments, number, kills = random.Random(1), 0, 0
    stopped_at = set()
    while kills < KILLS:
        cache = tmp_path / f"killed-{number}"
        if not killed(lambda cache=cache: align(cache), moments, int(0.8 * events)):
            number += 1  # it was finished before the kill came; the next one starts from nothing
            continue
        kills += 1
        assert finished_files(cache).items() <= whole.items()
        stopped_at.add(tuple(sorted(len(list(one.glob("*"))) for one in cache.glob("*/.*.building"))))
    assert len(stopped_at) > 3  # kills did come at different moments
    for cache in tmp_path.glob("killed-*"):
        align(cache)
        assert finished_files(cache) == whole
        assert not list(cache.rglob("*.tmp"))
