"""SIGKILL at any moment: what was finished stays, nothing is half there, and the end is the same to the byte.

Children are forked from this process, so that the imports are paid once.
"""

import os
import random
import signal
import time
from dataclasses import replace

import pytest
from tiny_models import encoder

from fusion.config.schema import TeacherConfig
from fusion.dialogues.dialogue import chat
from fusion.teaching.store import DistributionStore
from fusion.teaching.teach import teach, teach_share

KILLS = 20
TEACHER = TeacherConfig(top_k=4, batch_tokens=64, shard_dialogues=3, device="cpu")


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def fork(work):
    """Run `work` in a process of its own; return its id."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)  # without pytest's own ending
    return child


def ended(child):
    """How a child ended: its exit status, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_after(child, seconds):
    """Kill `child` so long after now; whether it was still alive."""
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return ended(child) == -signal.SIGKILL


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


def seconds_of(read, cache):
    started = time.perf_counter()
    assert ended(fork(lambda: read(cache))) == 0
    return time.perf_counter() - started


def test_a_teacher_pass_that_is_killed_again_and_again(read, whole, tmp_path, monkeypatch):
    """Every pass goes on where the last one was killed, until the store is finished; then a new one is begun."""
    duration = seconds_of(read, tmp_path / "timed")
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
        child = fork(lambda cache=cache: read(cache))
        if not kill_after(child, moments.uniform(0, 0.8 * duration)):
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
    for attempt, moment in enumerate((0.05, 0.15, 0.3)):
        cache = tmp_path / str(attempt)
        settings = [replace(TEACHER, workers=3, worker=worker) for worker in range(3)]
        children = [fork(lambda one=one, cache=cache: read(cache, one)) for one in settings]
        kill_after(children[attempt], moment)
        others = [ended(child) for place, child in enumerate(children) if place != attempt]
        assert others == [0, 0]
        assert check_building(cache, whole) >= 2 * 40 // 3
        assert content(read(cache).folder) == whole


def test_jobs_that_want_the_same_store_at_once_write_it_once(read, whole, tmp_path):
    children = [fork(lambda: read(tmp_path / "same")) for _ in range(3)]
    assert [ended(child) for child in children] == [0, 0, 0]
    assert content(read(tmp_path / "same").folder) == whole
