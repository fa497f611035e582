"""Digests outlive the process that took them, and no change of a file."""

import json
import os
from pathlib import Path

import pytest

from fusion.cache import FileState, digests, file_hash, folder_hash, keep_digests, known_digest, remember

LARGE = digests.LEAST_BYTES
OLD = (1_600_000_000, 1_600_000_000)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache whose digests are kept; nothing is known yet, and files count as settled at once."""
    monkeypatch.setattr(digests, "_known", {})
    monkeypatch.setattr(digests, "_notes", [])
    monkeypatch.setattr(digests, "SETTLED_NS", -3_600_000_000_000)  # a clock may be set back meanwhile
    keep_digests(tmp_path / "cache")
    return tmp_path / "cache"


def written(path: Path, content: bytes) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    os.utime(path, OLD)
    return path


def in_a_new_process(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "_known", {})
    monkeypatch.setattr(digests, "_notes", [])
    keep_digests(cache)


def fresh_hash(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, list[str]]:
    """The folder's hash, without what this process knows of folders, and the files that were read for it."""
    read: list[str] = []

    def noting(path: Path) -> str:
        read.append(path.name)
        return file_hash(path)

    monkeypatch.setattr(digests, "file_hash", noting)
    folder_hash.__globals__["_folder_hash"].cache_clear()
    return folder_hash(folder), read


def test_files_that_were_left_alone_are_read_once(tmp_path, cache, monkeypatch):
    written(tmp_path / "model" / "weights", b"a" * LARGE)
    written(tmp_path / "model" / "config.json", b"{}")
    first, read = fresh_hash(tmp_path / "model", monkeypatch)
    assert sorted(read) == ["config.json", "weights"]
    in_a_new_process(cache, monkeypatch)
    assert fresh_hash(tmp_path / "model", monkeypatch) == (first, ["config.json"])


def test_another_file_of_the_same_size_and_time_is_read(tmp_path, cache, monkeypatch):
    weights = written(tmp_path / "model" / "weights", b"a" * LARGE)
    first, _ = fresh_hash(tmp_path / "model", monkeypatch)
    os.replace(written(tmp_path / "other", b"b" * LARGE), weights)
    second, read = fresh_hash(tmp_path / "model", monkeypatch)
    assert (first != second, read) == (True, ["weights"])


def test_what_changed_just_now_is_not_noted(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(digests, "SETTLED_NS", 3_600_000_000_000)
    weights = written(tmp_path / "model" / "weights", b"a" * LARGE)
    fresh_hash(tmp_path / "model", monkeypatch)
    assert known_digest(FileState.of(weights)) == file_hash(weights)
    in_a_new_process(cache, monkeypatch)
    assert known_digest(FileState.of(weights)) is None


def test_a_file_that_changed_while_it_was_read_is_not_remembered(tmp_path, cache):
    weights = written(tmp_path / "weights", b"a" * LARGE)
    before = FileState.of(weights)
    written(weights, b"b" * (LARGE + 1))
    remember(before, "digest of a mixture")
    assert known_digest(before) is None
    assert known_digest(FileState.of(weights)) is None


def test_torn_and_odd_notes_are_passed_over(tmp_path, cache, monkeypatch):
    weights = written(tmp_path / "weights", b"a" * LARGE)
    state = FileState.of(weights)
    cache.mkdir()
    lines = ["[1, 2]", "7", json.dumps([*state, "kept"]), "\x00\ufffd", json.dumps([*state, "torn"])[:-9]]
    (cache / digests.NOTES).write_text("\n".join(lines))
    in_a_new_process(cache, monkeypatch)
    assert known_digest(state) == "kept"


def test_without_a_place_to_write_nothing_is_noted(tmp_path, cache, monkeypatch):
    (tmp_path / "cache").write_text("a file where the cache should be")
    weights = written(tmp_path / "model" / "weights", b"a" * LARGE)
    fresh_hash(tmp_path / "model", monkeypatch)
    assert known_digest(FileState.of(weights)) == file_hash(weights)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_costs_the_note_alone(tmp_path, cache, monkeypatch):
    cache.mkdir()
    (cache / digests.NOTES).symlink_to("/dev/full")
    weights = written(tmp_path / "model" / "weights", b"a" * LARGE)
    fresh_hash(tmp_path / "model", monkeypatch)
    assert known_digest(FileState.of(weights)) == file_hash(weights)
