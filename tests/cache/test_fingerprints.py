"""Equal inputs, settings and code have equal names; anything that counts changes the name."""

import importlib
import os
import shutil
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion.cache import canonical_json, code_version, file_hash, fingerprint, folder_hash

scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8"))
)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc"), inner))


class Colour(Enum):
    RED = "red"


@dataclass(frozen=True)
class Inner:
    rate: float = 0.1


@dataclass(frozen=True)
class Outer:
    path: Path = Path("/a")
    inner: Inner = field(default_factory=Inner)
    colour: Colour = Colour.RED
    pair: tuple[int, int] = (1, 2)


@settings(max_examples=30)
@given(st.dictionaries(st.text("abcdef"), values, max_size=5))
def test_the_order_of_a_key_does_not_count(key):
    backwards = dict(reversed(key.items()))
    assert fingerprint(key) == fingerprint(backwards)
    assert len(fingerprint(key)) == 16
    assert int(fingerprint(key), 16) >= 0


@settings(max_examples=30)
@given(values, values)
def test_different_values_have_different_names(one, other):
    same = canonical_json({"v": one}) == canonical_json({"v": other})
    assert (fingerprint({"v": one}) == fingerprint({"v": other})) == same


def test_dataclasses_paths_and_enums_count_by_content():
    assert fingerprint({"s": Outer()}) == fingerprint({"s": Outer()})
    changed = [
        replace(Outer(), path=Path("/b")),
        replace(Outer(), inner=Inner(0.2)),
        replace(Outer(), pair=(2, 1)),
    ]
    assert len({fingerprint({"s": one}) for one in [Outer(), *changed]}) == 4


@pytest.mark.parametrize("value", [{1, 2}, object(), b"bytes", Inner])
def test_values_without_a_stable_text_are_refused(value):
    with pytest.raises(TypeError, match="fingerprint"):
        fingerprint({"value": value})


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model" / "deep").mkdir(parents=True)
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "deep" / "weights").write_bytes(b"\x01" * 10)
    return tmp_path / "model"


def test_a_copied_folder_has_the_same_hash(folder, tmp_path):
    before = folder_hash(folder)
    shutil.copytree(folder, tmp_path / "copy")
    os.utime(tmp_path / "copy" / "config.json", (1, 1))
    assert folder_hash(tmp_path / "copy") == before


def test_content_and_names_of_a_folder_count(folder):
    seen = {folder_hash(folder)}
    (folder / "deep" / "weights").write_bytes(b"\x02" * 10)
    os.utime(folder / "deep" / "weights", ns=(1, 1))
    seen.add(folder_hash(folder))
    (folder / "config.json").rename(folder / "settings.json")
    seen.add(folder_hash(folder))
    (folder / "empty").touch()
    seen.add(folder_hash(folder))
    assert len(seen) == 4


def test_hidden_files_and_folders_do_not_count(folder):
    before = folder_hash(folder)
    (folder / ".gitattributes").write_text("*")
    (folder / ".cache" / "huggingface").mkdir(parents=True)
    (folder / ".cache" / "huggingface" / "weights.metadata").write_text("downloaded today")
    assert folder_hash(folder) == before


def test_file_hash_is_sha256(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert file_hash(tmp_path / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


CODE = '''
"""Module."""
RATE = 1


class Settings:
    """Settings."""

    rate: float = 0.1
    """The rate."""


def double(x):
    """Doubles."""
    return 2 * x  # really
'''


@pytest.fixture
def version_of(tmp_path, monkeypatch):
    """The code version of a module with the given text (each under its own name: versions are remembered)."""
    monkeypatch.syspath_prepend(tmp_path)
    count = iter(range(100))

    def version(text: str) -> str:
        name = f"versioned_{tmp_path.name}_{next(count)}"
        (tmp_path / f"{name}.py").write_text(text)
        importlib.invalidate_caches()  # a folder may change twice within one tick of its time stamp
        return code_version(name)

    return version


@pytest.mark.parametrize(
    "change",
    [
        ("# really", "# truly"),
        ('"""Doubles."""', '"""Twice."""'),
        ('"""The rate."""', '"""Speed."""'),
        ("RATE =", "RATE="),
    ],
)
def test_comments_docstrings_and_layout_are_no_code(version_of, change):
    assert change[0] in CODE
    assert version_of(CODE) == version_of(CODE.replace(*change))


@pytest.mark.parametrize("change", [("2 * x", "3 * x"), ("0.1", "0.2"), ("RATE = 1", "RATE = 2"), ("double", "twice")])
def test_code_is_code(version_of, change):
    assert version_of(CODE) != version_of(CODE.replace(*change))


def test_a_package_counts_with_everything_below_it(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    versions = []
    for number, text in enumerate(["x = 1", "x = 2"]):
        package = tmp_path / f"package_{number}" / "inner"
        package.mkdir(parents=True)
        for init in (package, package.parent):
            (init / "__init__.py").touch()
        (package / "module.py").write_text(text)
        importlib.invalidate_caches()
        versions.append(code_version(f"package_{number}"))
    assert versions[0] != versions[1]


def test_a_module_that_does_not_exist_has_no_version():
    with pytest.raises(ModuleNotFoundError):
        code_version("fusion.nothing_of_that_name")
