"""A folder that several fill piece by piece: every piece once, nobody waits for the dead, one of them finishes it."""

import json
import os
import signal
import threading
import time

import pytest
from forked import ended, fork
from waiting import PATIENCE, wait_for

from fusion.cache import Pieces, fingerprint, make_share, shared_folder, write_text
from fusion.cache.folder import discard_unfinished

KEY = {"inputs": "abc"}
COUNT = 12


def has(folder, number):
    return (folder / f"piece-{number}").is_file()


def pieces(made, at_once=1, before=lambda folder, number: None):
    """Pieces that note in `made` who was made, and in which lists."""

    def make(folder, claims):
        for numbers in claims:
            for number in numbers:
                before(folder, number)
                write_text(folder / f"piece-{number}", f"piece {number}")
            made.append(numbers)

    def finish(folder):
        write_text(folder / "index", " ".join(sorted(path.name for path in folder.glob("piece-*"))))

    return Pieces(COUNT, has, make, finish, at_once)


def content(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


@pytest.fixture
def whole(tmp_path):
    return content(shared_folder(tmp_path / "whole", "stage", KEY, pieces([])))


def test_one_alone_makes_every_piece_once(tmp_path):
    made = []
    folder = shared_folder(tmp_path, "stage", KEY, pieces(made))
    assert made == [[number] for number in range(COUNT)]
    assert folder == tmp_path / "stage" / fingerprint(KEY)
    assert {path.name for path in folder.iterdir()} == {*(f"piece-{n}" for n in range(COUNT)), "index", "key.json"}
    assert json.loads((folder / "key.json").read_text()) == KEY
    assert shared_folder(tmp_path, "stage", KEY, pieces(made)) == folder
    assert len(made) == COUNT
    assert sorted(path.name for path in (tmp_path / "stage").iterdir()) == [f".{folder.name}.lock", folder.name]


@pytest.mark.parametrize("at_once", [1, 5, 100])
def test_many_at_the_same_time_make_every_piece_once(tmp_path, whole, at_once):
    made, found = [], []
    together = threading.Barrier(6)

    def work():
        together.wait()
        slowly = pieces(made, at_once, before=lambda folder, number: time.sleep(0.002))
        found.append(shared_folder(tmp_path, "stage", KEY, slowly))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert len(found) == 6
    assert sorted(number for numbers in made for number in numbers) == list(range(COUNT))
    assert max(map(len, made)) <= at_once
    assert content(found[0]) == whole


def test_shares_add_up_and_the_last_one_finishes(tmp_path, whole):
    made = []
    assert make_share(tmp_path, "stage", KEY, pieces(made), range(1, COUNT, 3)) is None
    assert make_share(tmp_path, "stage", KEY, pieces(made), range(0, COUNT, 3)) is None
    assert made == [[1], [4], [7], [10], [0], [3], [6], [9]]
    assert not (tmp_path / "stage" / fingerprint(KEY)).exists()
    folder = make_share(tmp_path, "stage", KEY, pieces(made), range(2, COUNT, 3))
    assert folder is not None
    assert content(folder) == whole
    made.clear()
    assert make_share(tmp_path, "stage", KEY, pieces(made), range(0, COUNT, 3)) == folder
    assert made == []


def test_one_without_a_share_makes_what_is_missing(tmp_path, whole):
    made = []
    make_share(tmp_path, "stage", KEY, pieces([]), range(0, COUNT, 2))
    assert content(shared_folder(tmp_path, "stage", KEY, pieces(made))) == whole
    assert made == [[number] for number in range(1, COUNT, 2)]


@pytest.mark.parametrize("death", [KeyboardInterrupt, RuntimeError])
def test_an_error_gives_the_locks_back(tmp_path, whole, death):
    def dies(folder, number):
        if number == 4:
            (folder / ".piece-4.4711.tmp").write_text("half a pi")
            raise death

    made = []
    with pytest.raises(death) as kept_alive:  # and with it the frames of the build
        shared_folder(tmp_path, "stage", KEY, pieces([], before=dies))
    assert content(shared_folder(tmp_path, "stage", KEY, pieces(made))) == whole
    assert made == [[number] for number in range(4, COUNT)]
    assert kept_alive.value is not None


def test_nobody_waits_for_a_process_that_was_killed(tmp_path, whole):
    reached = tmp_path / "reached"

    def hangs(folder, number):
        if number == 3:
            reached.touch()
            time.sleep(PATIENCE)

    child = fork(lambda: shared_folder(tmp_path, "stage", KEY, pieces([], before=hangs)))
    wait_for(reached.exists)
    made, found = [], []
    waiting = threading.Thread(target=lambda: found.append(shared_folder(tmp_path, "stage", KEY, pieces(made))))
    waiting.start()
    wait_for(lambda: len(made) == COUNT - 4)
    waiting.join(0.3)  # time to go wrong
    assert waiting.is_alive()  # all but piece 3 are made, which another one holds
    assert made == [[number] for number in range(4, COUNT)]
    os.kill(child, signal.SIGKILL)
    assert ended(child) == -signal.SIGKILL
    waiting.join(PATIENCE)
    assert made == [*([number] for number in range(4, COUNT)), [3]]
    assert content(found[0]) == whole


def test_leftovers_can_be_thrown_away_with_their_locks(tmp_path):
    make_share(tmp_path, "stage", KEY, pieces([]), [0])
    assert len(list((tmp_path / "stage").iterdir())) == 3
    assert discard_unfinished(tmp_path) == 1
    assert [path.name for path in (tmp_path / "stage").iterdir()] == [f".{fingerprint(KEY)}.lock"]
