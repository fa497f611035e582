"""A stage's folder: built once, seen only when finished, resumed after a kill."""

import json
import threading

import pytest

from fusion.cache import cached_folder, fingerprint, write_text
from fusion.cache.folder import discard_unfinished

KEY = {"inputs": "abc", "rate": 0.5}


def test_a_folder_is_built_once_and_describes_itself(tmp_path):
    builds = []

    def build(folder):
        builds.append(folder)
        write_text(folder / "result.txt", "done")

    first = cached_folder(tmp_path, "stage", KEY, build)
    second = cached_folder(tmp_path, "stage", dict(reversed(KEY.items())), build)
    assert first == second == tmp_path / "stage" / fingerprint(KEY)
    assert len(builds) == 1
    assert builds[0] != first
    assert not builds[0].exists()
    assert (first / "result.txt").read_text() == "done"
    assert json.loads((first / "key.json").read_text("utf-8")) == KEY


def test_other_keys_and_other_stages_have_other_folders(tmp_path):
    folders = {
        cached_folder(tmp_path, stage, {"rate": rate}, lambda folder: None)
        for stage in ("one", "two")
        for rate in (1, 2)
    }
    assert len(folders) == 4


@pytest.mark.parametrize("death", [KeyboardInterrupt, RuntimeError])
def test_a_killed_build_is_invisible_and_finds_its_work_again(tmp_path, death):
    def dies(folder):
        write_text(folder / "shard-0", "finished work")
        (folder / ".shard-1.4711.tmp").write_text("half a fi")
        raise death

    def resumes(folder):
        assert (folder / "shard-0").read_text() == "finished work"
        write_text(folder / "shard-1", "more")

    with pytest.raises(death):
        cached_folder(tmp_path, "stage", KEY, dies)
    assert not (tmp_path / "stage" / fingerprint(KEY)).exists()
    folder = cached_folder(tmp_path, "stage", KEY, resumes)
    assert sorted(path.name for path in folder.iterdir()) == ["key.json", "shard-0", "shard-1"]


def test_two_that_want_the_same_folder_build_it_once(tmp_path):
    builds, found = [], []
    together = threading.Barrier(2)

    def build(folder):
        builds.append(threading.get_ident())
        write_text(folder / "result", "x" * 1000)

    def want():
        together.wait()
        found.append(cached_folder(tmp_path, "stage", KEY, build))

    threads = [threading.Thread(target=want) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1
    assert found[0] == found[1]


def test_leftovers_of_killed_builds_can_be_thrown_away(tmp_path):
    def dies(folder):
        write_text(folder / "deep" / "file", "x")
        raise KeyboardInterrupt

    kept = cached_folder(tmp_path, "stage", {"kept": True}, lambda folder: None)
    for rate in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            cached_folder(tmp_path, "stage", {"rate": rate}, dies)
    assert discard_unfinished(tmp_path) == 2
    assert discard_unfinished(tmp_path) == 0
    assert kept.is_dir()
