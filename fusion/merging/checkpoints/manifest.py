"""`manifest.json` beside a merged model: the SHA-256 of everything that went in and came out. Needs no torch."""

import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from fusion import __version__
from fusion.cache import file_hash, write_json
from fusion.config import UserError

MANIFEST_FILE = "manifest.json"


def versions() -> dict[str, str]:
    return {"fusion": __version__, "python": platform.python_version(), "torch": version("torch")}


class HashedFolder(NamedTuple):
    folder: Path
    files: Mapping[str, str | None]
    """Path below the folder -> SHA-256; None: it was not taken."""

    @classmethod
    def of(cls, folder: Path, files: Sequence[Path], digests: Mapping[Path, str]) -> "HashedFolder":
        return cls(
            folder.resolve(), {file.relative_to(folder).as_posix(): digests.get(file) for file in sorted(files)}
        )


def write_manifest(
    folder: Path, request: Mapping[str, object], inputs: Mapping[str, HashedFolder], outputs: HashedFolder
) -> None:
    """Record in `folder` what was asked, each input by its role, and every file that came out."""
    manifest = {
        **request,
        "versions": versions(),
        "inputs": {role: {"folder": str(source.folder), "files": source.files} for role, source in inputs.items()},
        "outputs": outputs.files,
    }
    write_json(folder / MANIFEST_FILE, manifest)


def find_manifest(folder: Path) -> Path:
    """The manifest of a merged model: `folder` itself, or a run's folder with the model in `model/`."""
    for path in (folder / MANIFEST_FILE, folder / "model" / MANIFEST_FILE):
        if path.is_file():
            return path
    raise UserError(f"{folder}: no {MANIFEST_FILE} here or in model/: give a merged model's folder or its run's")


def differences(path: Path, *, check_inputs: bool = True) -> tuple[int, list[str]]:
    """How many files the manifest at `path` lists, and what is changed or missing among them."""
    try:
        manifest = json.loads(path.read_text("utf-8"))
        expected = [(path.parent / name, digest) for name, digest in manifest["outputs"].items()]
        if check_inputs:
            expected += [
                (Path(source["folder"]) / name, digest)
                for source in manifest["inputs"].values()
                for name, digest in source["files"].items()
            ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a merge manifest ({error!r})") from error
    found = [f"{file}: missing" if not file.is_file() else _changed(file, digest) for file, digest in expected]
    return len(expected), [problem for problem in found if problem]


def _changed(file: Path, digest: str | None) -> str:
    if digest is None:
        return f"{file}: no checksum was taken (engine.checksums=false), so nobody can tell whether it is unchanged"
    return "" if file_hash(file) == digest else f"{file}: changed since the merge"
