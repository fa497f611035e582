"""Paths in records: absolute where something lies there, so that other folders can read them later."""

from pathlib import Path

from fusion.config.schema import DataConfig
from fusion.config.world import WorldConfig
from fusion.world.resolve import with_world_paths


def test_what_lies_here_gets_an_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "a").mkdir(parents=True)
    (tmp_path / "mine.jsonl").touch()
    given = DataConfig("mine", "mine.jsonl", heldout_path="not_there.jsonl")
    models, data = with_world_paths(["models/a", "owner/name"], given, WorldConfig(), Path("cache"))
    assert models == [str(tmp_path / "models" / "a"), "owner/name"]
    assert (data.path, data.heldout_path, data.test_path) == (
        str(tmp_path / "mine.jsonl"),
        "not_there.jsonl",
        None,
    )
    assert not (tmp_path / "cache").exists()  # no world for nothing
