"""A model folder as a mapping from tensor names to tensors, each read from its safetensors file when asked for."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor

from fusion.config import UserError, raise_problems
from fusion.merging.checkpoints.tensor_file import TensorFile, TensorHome, TensorSpec, open_tensor_file, short_reason

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
CONFIG_FILE = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class Checkpoint(Mapping[str, Tensor]):
    """The weights of a model folder. `config` is its `config.json`, empty when it has none.

    `index`: the file that says which weights there are, where the folder has one. An adapter's is its settings.
    """

    folder: Path
    files: tuple[TensorFile, ...]
    homes: Mapping[str, TensorHome]
    config: Mapping[str, object]
    index: Path | None

    def __getitem__(self, name: str) -> Tensor:
        return self.homes[name].read(name)

    def __contains__(self, name: object) -> bool:
        """From the headers: `Mapping` would read the tensor."""
        return name in self.homes

    def __iter__(self) -> Iterator[str]:
        return iter(self.homes)

    def __len__(self) -> int:
        return len(self.homes)

    @property
    def specs(self) -> dict[str, TensorSpec]:
        return {name: file.specs[name] for name, file in self.homes.items()}


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read the headers of a Hugging Face model folder, in one file or in shards.

    Raises:
        UserError: no folder, no safetensors (pickled weights are refused), a corrupt file, an index that lies, a link
            out of the folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    if is_adapter(folder):
        raise UserError(f"{folder}: an adapter, not a model: it can be a target, with its model as the base")
    shard_names, index = _shard_names(folder)
    files, problems = [], []
    for name in shard_names:
        try:
            files.append(_open_inside(folder, name, bool(index)))
        except (UserError, OSError) as error:
            problems += error.problems if isinstance(error, UserError) else [str(error)]
    raise_problems(problems)
    if index:
        raise_problems(_index_problems(folder / INDEX_FILE, index, files))
    homes: dict[str, TensorHome] = {name: file for file in files for name in file.specs}
    return Checkpoint(
        folder, tuple(files), homes, read_json(folder / CONFIG_FILE), folder / INDEX_FILE if index else None
    )


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter of peft, and no model."""
    has_weights = (folder / SINGLE_FILE).is_file() or (folder / INDEX_FILE).is_file()
    return (folder / ADAPTER_CONFIG).is_file() and not has_weights


def links_outside(folder: Path, paths: Iterable[Path]) -> list[str]:
    """A problem for every link out of a model's folder; into the store of a hub cache around it links may lead."""
    root = folder.resolve()
    allowed = [root, *(parent.parent / "blobs" for parent in root.parents if parent.name == "snapshots")]
    return [
        f"{path}: a link to {path.resolve()}, outside of the model's folder: refused; put the file itself there"
        for path in paths
        if not any(path.resolve().is_relative_to(place) for place in allowed)
    ]


def _open_inside(folder: Path, name: str, is_listed: bool) -> TensorFile:
    path = folder / name
    raise_problems(links_outside(folder, [path]))
    if is_listed and not path.is_file():
        raise UserError(f"{path}: missing, but {INDEX_FILE} lists tensors in it: fetch the file")
    return open_tensor_file(path)


def _shard_names(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Names of the weight files, and the index's map from tensor to file (empty without an index)."""
    if (folder / SINGLE_FILE).is_file():
        return [SINGLE_FILE], {}
    if (folder / INDEX_FILE).is_file():
        index = _read_index(folder / INDEX_FILE)
        return sorted(set(index.values())), index
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if len(found) == 1:
        return found, {}
    if found:
        raise UserError(f"{folder}: several safetensors files ({', '.join(found)}) but no {INDEX_FILE}: add the index")
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise UserError(
            f"{folder}: holds pickled weights ({pickles[0]}), which can run code when they are loaded: refused, "
            "save the model again as safetensors"
        )
    raise UserError(f"{folder}: no safetensors weights ({SINGLE_FILE} or {INDEX_FILE})")


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text("utf-8"))["weight_map"]
        entries = {str(name): str(shard) for name, shard in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not a safetensors index ({short_reason(error)}): fetch the file again") from error
    outside = sorted({shard for shard in entries.values() if not _is_plain_name(shard)})
    raise_problems([f"{path}: '{shard}' is not the name of a file in this folder: refused" for shard in outside])
    if not entries:
        raise UserError(f"{path}: lists no tensors")
    return entries


def _is_plain_name(name: str) -> bool:
    return PurePosixPath(name).name == name and "\\" not in name and name != ".."


def _index_problems(path: Path, index: Mapping[str, str], files: list[TensorFile]) -> list[str]:
    listed = set(index.items())
    held = {(name, file.path.name) for file in files for name in file.specs}
    repeated = [
        f"{path}: '{name}' is in several files ({', '.join(sorted(shard for one, shard in held if one == name))}): "
        "nobody can tell which is meant; keep one"
        for name, count in sorted(Counter(name for name, _ in held).items())
        if count > 1
    ]
    if repeated:
        return repeated
    missing = [f"{path}: '{name}' is not in {shard}, where the index says" for name, shard in sorted(listed - held)]
    extra = [f"{path}: '{name}' in {shard} is not listed there" for name, shard in sorted(held - listed)]
    return missing + extra


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty when there is no file.

    Raises:
        UserError: the file holds something else.
    """
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({short_reason(error)}): fetch the file again") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: must hold a JSON object")
    return config
