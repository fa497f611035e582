"""`manifest.json` beside a merged model: the SHA-256 of everything that went in and came out. Needs no torch."""

import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from fusion import __version__
from fusion.cache import file_hash, write_json
from fusion.config import UserError

MANIFEST_FILE = "manifest.json"


def versions() -> dict[str, str]:
    return {"fusion": __version__, "python": platform.python_version(), "torch": version("torch")}


def hashed_files(folder: Path, files: Sequence[Path]) -> dict[str, object]:
    """The folder and the SHA-256 of each of `files`, which are below it."""
    hashes = {file.relative_to(folder).as_posix(): file_hash(file) for file in sorted(files)}
    return {"folder": str(folder.resolve()), "files": hashes}


def write_manifest(
    folder: Path, request: Mapping[str, object], inputs: Mapping[str, tuple[Path, Sequence[Path]]]
) -> None:
    """Record what was asked, each input (role -> its folder and files), and every file now in `folder`."""
    outputs = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    manifest = {
        **request,
        "versions": versions(),
        "inputs": {role: hashed_files(source, files) for role, (source, files) in inputs.items()},
        "outputs": hashed_files(folder, outputs)["files"],
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


def _changed(file: Path, digest: str) -> str:
    return "" if file_hash(file) == digest else f"{file}: changed since the merge"
