"""LoRA adapters as targets: the base's weights plus what the adapter adds, computed where they are read.

A linear layer's weight is W + s B A (https://arxiv.org/abs/2106.09685) with s = alpha / r, or alpha / sqrt(r)
(rank-stabilised, https://arxiv.org/abs/2312.03732). The format is peft's (https://huggingface.co/docs/peft).
Shapes: R rank, O rows of a weight, I its columns.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusion.config import UserError, raise_problems
from fusion.merging.checkpoints.checkpoint import ADAPTER_CONFIG, ADAPTER_FILE, Checkpoint, read_json
from fusion.merging.checkpoints.tensor_file import TensorFile, TensorHome, TensorSpec, open_tensor_file, read_whole

PREFIX = "base_model.model."
FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<which>[AB])(\.weight)?")
PLAIN_STARTS = (True, False, "gaussian", "eva")
"""Ways to begin that leave the base's weights as they are."""
REFUSED = {
    "use_dora": "weights are decomposed (DoRA)",
    "lora_bias": "it trains biases",
    "layer_replication": "layers are repeated",
    "trainable_token_indices": "single tokens are trained",
    "target_parameters": "parameters of experts are adapted",
    "alora_invocation_tokens": "it is active behind some tokens only",
}


@dataclass(frozen=True)
class AdaptedTensor:
    """One weight of the base with its low-rank update; the sum is rounded once, to the base's dtype."""

    base: TensorHome
    adapter: TensorFile
    names: Mapping[str, str]
    """Names of the factors A [R, I] and B [O, R] in the adapter's file."""
    scaling: float
    is_transposed: bool
    """The update is (B A)^T: embeddings, and layers that keep their weights as [inputs, outputs]."""
    spec: TensorSpec

    @property
    def path(self) -> Path:
        return self.adapter.path

    @cached_property
    def specs(self) -> Mapping[str, TensorSpec]:
        return dict.fromkeys(self.base.specs, self.spec)

    def end(self, name: str) -> int:
        return 0

    def read(self, name: str) -> Tensor:
        return read_whole(self, name)

    def read_span(self, name: str, start: int, into_N: Tensor) -> None:
        """Fill `into_N` with the adapted elements from `start` on.

        The product is taken in float64, so that its rounding does not depend on where a span begins.
        """
        self.base.read_span(name, start, into_N)
        num_columns = self.spec.shape[1]
        first, last = start // num_columns, -(-(start + len(into_N)) // num_columns)
        begin = start - first * num_columns
        update_N = self._update(first, last).reshape(-1)[begin : begin + len(into_N)]
        into_N.copy_(update_N.add_(into_N))

    def _update(self, first: int, last: int) -> Tensor:
        """Rows `first` to before `last` of the update, float64."""
        if self.is_transposed:
            left, right = self.adapter.read(self.names["A"])[:, first:last].T, self.adapter.read(self.names["B"]).T
        else:
            name = self.names["B"]
            rank = self.adapter.specs[name].shape[1]
            left = torch.empty((last - first) * rank, dtype=self.adapter.specs[name].dtype)
            self.adapter.read_span(name, first * rank, left)
            left, right = left.view(-1, rank), self.adapter.read(self.names["A"])
        return (left.double() @ right.double()).mul_(self.scaling)


@dataclass(frozen=True)
class ReplacedTensor:
    """A weight that the adapter holds as a whole (`modules_to_save`), in the base's dtype."""

    adapter: TensorFile
    stored: str
    name: str
    spec: TensorSpec

    @property
    def path(self) -> Path:
        return self.adapter.path

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        return {self.name: self.spec}

    def end(self, name: str) -> int:
        return 0

    def read(self, name: str) -> Tensor:
        return read_whole(self, name)

    def read_span(self, name: str, start: int, into_N: Tensor) -> None:
        stored_N = torch.empty(len(into_N), dtype=self.adapter.specs[self.stored].dtype)
        self.adapter.read_span(self.stored, start, stored_N)
        into_N.copy_(stored_N)


def open_adapter(folder: Path, base: Checkpoint | None) -> Checkpoint:
    """A folder of peft's as a mapping to the weights of the `base` with its LoRA adapter.

    Raises:
        UserError: no base, an adapter of another kind, or one that does not fit the base.
    """
    if base is None:
        raise UserError(f"{folder}: an adapter needs the model that it belongs to: give the base (base=FOLDER)")
    settings = read_json(folder / ADAPTER_CONFIG)
    raise_problems([f"{folder / ADAPTER_CONFIG}: {problem}" for problem in _unsupported(settings)])
    path = folder / ADAPTER_FILE
    if not path.is_file():
        raise UserError(f"{folder}: no {ADAPTER_FILE} (pickled adapters are refused): save it again as safetensors")
    adapter = open_tensor_file(path)
    homes, problems = _homes(adapter, base, settings)
    raise_problems([f"{path}: {problem}" for problem in problems])
    return Checkpoint(folder, (adapter,), homes, base.config, folder / ADAPTER_CONFIG)


def _unsupported(settings: Mapping[str, Any]) -> Iterator[str]:
    advice = "merge it into its model with peft (merge_and_unload), and give that folder"
    if settings.get("peft_type") != "LORA":
        yield f"peft_type is {settings.get('peft_type')}, and only LORA is read: {advice}"
        return
    for key, what in REFUSED.items():
        if settings.get(key):
            yield f"{key}: {what}: {advice}"
    if settings.get("bias", "none") != "none":
        yield f"bias is {settings['bias']}, and only none is read: {advice}"
    if settings.get("init_lora_weights", True) not in PLAIN_STARTS:
        yield f"init_lora_weights is {settings['init_lora_weights']}, which may change the base's weights: {advice}"
    for key in ("r", "lora_alpha"):
        if isinstance(settings.get(key), bool) or not isinstance(settings.get(key), int | float) or settings[key] <= 0:
            yield f"{key} is {settings.get(key)!r}: must be a number above 0"
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(settings.get(key) or {}, Mapping):
            yield f"{key} is {settings[key]!r}: must be a mapping"


def _homes(
    adapter: TensorFile, base: Checkpoint, settings: Mapping[str, Any]
) -> tuple[dict[str, TensorHome], list[str]]:
    """Where each weight of the adapted model is read, and what does not fit."""
    homes: dict[str, TensorHome] = dict(base.homes)
    factors: dict[str, dict[str, str]] = {}
    embeddings, problems = set(), []
    for stored in adapter.specs:
        name = stored.removeprefix(PREFIX).replace(".base_layer.", ".").replace(".modules_to_save.", ".")
        found = FACTOR.fullmatch(name)
        if found:
            weight = f"{found['module']}.weight"
            factors.setdefault(weight, {})[found["which"]] = stored
            if found["embedding"]:
                embeddings.add(weight)
        elif ".lora_" in name or name not in homes:
            problems.append(f"'{stored}' belongs to no weight of the base ({base.folder})")
        elif adapter.specs[stored].shape != base.specs[name].shape:
            problems.append(f"'{stored}' is {adapter.specs[stored]}, but {base.specs[name]} in the base")
        else:
            homes[name] = ReplacedTensor(adapter, stored, name, base.specs[name])
    for weight, names in factors.items():
        if weight not in homes or set(names) != {"A", "B"}:
            lacks = "the base lacks it" if weight not in homes else "one of its factors is missing"
            problems.append(f"'{weight}' is adapted, but {lacks} ({base.folder})")
            continue
        is_transposed = weight in embeddings or bool(settings.get("fan_in_fan_out"))
        module, spec = weight.removesuffix(".weight"), base.specs[weight]
        tensor = AdaptedTensor(homes[weight], adapter, names, _scaling(settings, module), is_transposed, spec)
        misfit = _misfit(tensor, _setting(settings, "rank_pattern", "r", module))
        problems += [f"'{weight}': {misfit}"] if misfit else []
        homes[weight] = tensor
    return homes, problems


def _setting(settings: Mapping[str, Any], patterns: str, default: str, module: str) -> Any:
    """A module's own value: that of the first pattern which fits the end of its name."""
    fitting = (value for key, value in (settings.get(patterns) or {}).items() if re.match(rf"(.*\.)?({key})$", module))
    return next(fitting, settings[default])


def _scaling(settings: Mapping[str, Any], module: str) -> float:
    rank = _setting(settings, "rank_pattern", "r", module)
    alpha = _setting(settings, "alpha_pattern", "lora_alpha", module)
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _misfit(tensor: AdaptedTensor, rank: int) -> str | None:
    """How the factors do not fit the weight."""
    shapes = [tensor.adapter.specs[tensor.names[which]].shape for which in ("A", "B")]
    rows_columns = tensor.spec.shape[::-1] if tensor.is_transposed else tensor.spec.shape
    if len(tensor.spec.shape) != 2:
        return f"only matrices can be adapted, and it is {tensor.spec}"
    if shapes != [(rank, rows_columns[1]), (rows_columns[0], rank)]:
        return (
            f"factors of {list(shapes[0])} and {list(shapes[1])} do not fit rank {rank} and a weight of {tensor.spec}"
        )
    return None
