"""Names made of content: equal inputs, settings and code give the same name, on any machine."""

import ast
import dataclasses
import hashlib
import importlib.util
import json
from collections.abc import Mapping
from enum import Enum
from functools import cache
from pathlib import Path

from fusion.cache.digests import remembered_hashes

FINGERPRINT_LENGTH = 16
CARD = "README.md"


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"a fingerprint cannot be made of {type(value).__name__}")


def canonical_json(key: Mapping[str, object]) -> str:
    """`key` as JSON with sorted keys; dataclasses, enums and paths are allowed in it."""
    return json.dumps(key, indent=1, sort_keys=True, default=_plain, ensure_ascii=False)


def fingerprint(key: Mapping[str, object]) -> str:
    """16 hex digits of the SHA-256 of the canonical JSON of `key`."""
    return hashlib.sha256(canonical_json(key).encode("utf-8")).hexdigest()[:FINGERPRINT_LENGTH]


@cache
def _folder_hash(folder: Path, stamp: tuple[tuple[str, int, int], ...]) -> str:
    digest = hashlib.sha256()
    names = [name for name, _, _ in stamp]
    for name, content in zip(names, remembered_hashes(folder / name for name in names), strict=True):
        digest.update(f"{name}\0{content}\0".encode())
    return digest.hexdigest()


def folder_hash(folder: Path) -> str:
    """SHA-256 over names and contents of every visible file below `folder` (read once per process and state).

    The folder's card (`README.md`) does not count: what it says of a model does not change it.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and _counts(path.relative_to(folder)))
    stamp = tuple(
        (path.relative_to(folder).as_posix(), path.stat().st_size, path.stat().st_mtime_ns) for path in files
    )
    return _folder_hash(folder.resolve(), stamp)


def _counts(path: Path) -> bool:
    return path.as_posix() != CARD and not any(part.startswith(".") for part in path.parts)


def _without_docstrings(tree: ast.Module) -> ast.Module:
    """`tree` without statements that are only a constant: docstrings, and the sentences under fields."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [
                one for one in node.body if not (isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant))
            ]
    return tree


def _source_files(module: str) -> list[Path]:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(module)
    origin = Path(spec.origin)
    return sorted(origin.parent.rglob("*.py")) if origin.name == "__init__.py" else [origin]


@cache
def code_version(*modules: str) -> str:
    """Fingerprint of the code of `modules` (packages: every file below), blind to comments and docstrings.

    Stages put it into their cache key, so that a changed algorithm never reads results of the old one.
    """
    digest = hashlib.sha256()
    for file in (file for module in modules for file in _source_files(module)):
        digest.update(ast.dump(_without_docstrings(ast.parse(file.read_text("utf-8")))).encode())
    return digest.hexdigest()[:FINGERPRINT_LENGTH]


@cache
def source_version(*modules: str) -> str:
    """As `code_version`, but of the files as they are: found at once, for what is not kept for long."""
    digest = hashlib.sha256()
    for file in (file for module in modules for file in _source_files(module)):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:FINGERPRINT_LENGTH]
