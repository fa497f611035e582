"""A file is there whole or not at all."""

import json
import os

import pytest

from fusion.cache import fsync_tree, write_bytes, write_json, write_text


def test_writes_make_their_folder_and_leave_nothing_else(tmp_path):
    target = tmp_path / "a" / "b" / "file.bin"
    write_bytes(target, b"\x00\xff")
    assert target.read_bytes() == b"\x00\xff"
    assert os.listdir(target.parent) == ["file.bin"]


def test_writes_replace_the_old_content_at_once(tmp_path):
    target = tmp_path / "file.txt"
    write_text(target, "a long old text")
    write_text(target, "new, 北京\n")
    assert target.read_bytes() == "new, 北京\n".encode()


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_write_that_dies_leaves_the_old_file(tmp_path, monkeypatch, broken):
    target = tmp_path / "file.txt"
    write_text(target, "old")

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, broken, die)
    with pytest.raises(KeyboardInterrupt):
        write_text(target, "new")
    assert target.read_text() == "old"


def test_json_is_the_same_bytes_whatever_the_order(tmp_path):
    write_json(tmp_path / "a.json", {"b": 1, "a": ["é", None]})
    write_json(tmp_path / "b.json", {"a": ["é", None], "b": 1})
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert json.loads((tmp_path / "a.json").read_text("utf-8")) == {"a": ["é", None], "b": 1}
    assert "é" in (tmp_path / "a.json").read_text("utf-8")


def test_fsync_reaches_every_file_and_folder(tmp_path, monkeypatch):
    write_text(tmp_path / "a" / "b" / "c.txt", "c")
    write_text(tmp_path / "d.txt", "d")
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(os.fstat(descriptor).st_ino))
    fsync_tree(tmp_path)
    assert set(flushed) == {path.stat().st_ino for path in [tmp_path, *tmp_path.rglob("*")]}
