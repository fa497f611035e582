"""In which files a merged model lies: those of the model that it is made from, or shards that suit the hub."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fusion.cache import write_json
from fusion.config.sizes import num_bytes
from fusion.merging.checkpoints.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint
from fusion.merging.checkpoints.tensor_file import TensorFile, TensorSpec, new_tensor_file


@dataclass(frozen=True)
class Layout:
    """The files to be made, by their names, and the index to copy when the files are those of an input."""

    files: tuple[TensorFile, ...]
    index: Path | None = None

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files)

    @property
    def preambles(self) -> dict[str, str]:
        """What tells layouts apart."""
        return {file.path.name: file.preamble.decode("latin-1") for file in self.files}

    def at(self, folder: Path) -> list[TensorFile]:
        return [file.layout_at(folder / file.path.name) for file in self.files]

    def write_index(self, folder: Path) -> None:
        if self.index is not None:
            shutil.copyfile(self.index, folder / INDEX_FILE)
        elif len(self.files) > 1:
            total = sum(spec.num_bytes for file in self.files for spec in file.specs.values())
            weight_map = {name: file.path.name for file in self.files for name in file.specs}
            write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def layout_of(reference: Checkpoint, shard_size: str) -> Layout:
    """The files of the model `reference`, with the tensors that the merge sees in it.

    They are the reference's own if none is larger than `shard_size`. Otherwise the tensors fill shards of at most that
    size in the reference's order; a tensor that is larger has a shard of its own.
    """
    specs, limit = reference.specs, num_bytes(shard_size)
    if specs == {name: spec for file in reference.files for name, spec in file.specs.items()}:
        layout = Layout(reference.files, reference.index)
    else:
        by_file: dict[str, dict[str, TensorSpec]] = {}
        for name, spec in specs.items():
            by_file.setdefault(reference.homes[name].path.name, {})[name] = spec
        layout = Layout(tuple(new_tensor_file(Path(name), held) for name, held in by_file.items()))
    if all(file.num_bytes <= limit for file in layout.files):
        return layout
    return Layout(tuple(_shards(specs, limit)))


def _shards(specs: Mapping[str, TensorSpec], limit: int) -> list[TensorFile]:
    shards: list[dict[str, TensorSpec]] = [{}]
    held = 0
    for name, spec in specs.items():
        if shards[-1] and held + spec.num_bytes > limit:
            shards.append({})
            held = 0
        shards[-1][name] = spec
        held += spec.num_bytes
    count = len(shards)
    names = [SINGLE_FILE] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    return [new_tensor_file(Path(name), shard) for name, shard in zip(names, shards, strict=True)]
