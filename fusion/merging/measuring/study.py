"""The dialogues that evidence is measured on, and the models that read them.

Tensor legend: B dialogues, T tokens, R supervised rows.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn import Parameter

from fusion.cache import cached_folder, code_version, fingerprint, folder_hash
from fusion.config import UserError
from fusion.config.schema import ModelConfig
from fusion.merging.checkpoints.checkpoint import open_checkpoint
from fusion.merging.evidence import Evidence

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fusion.dialogues.dialogue import Dialogue
    from fusion.dialogues.encode import Encoded
    from fusion.dialogues.reader import Reader

Whose = Literal["own", "all"]
CODE = (
    "fusion.merging.measuring",
    "fusion.merging.numerics.fisher_shares",
    "fusion.teaching",
    "fusion.dialogues",
    "fusion.objective",
)


@dataclass(frozen=True)
class Study:
    """Model folders of one pivot, and dialogues for each target; all are read in the pivot's chat template.

    `dialogues` are in the order of `targets`. `memory` bytes are for what is measured at once; models need theirs
    beside it. `seed` decides which dialogues a step sees.
    """

    pivot: ModelConfig
    base: Path | None
    targets: Sequence[Path]
    dialogues: "Sequence[Sequence[Dialogue]]"
    cache: Path
    max_length: int | None = None
    batch_tokens: int = 4096
    memory: int = 2 << 30
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.dialogues) != len(self.targets):
            raise UserError(f"dialogues of {len(self.dialogues)} targets are given, and {len(self.targets)} targets")
        if not any(self.dialogues):
            raise UserError("there are no dialogues to measure on: give some that the targets should do well on")

    @cached_property
    def reader(self) -> "Reader":
        from fusion.dialogues.reader import make_readers

        return make_readers([self.pivot], "native", self.max_length)[0]

    @property
    def all_dialogues(self) -> "list[Dialogue]":
        """Those of all targets, once each, in the order of their hashes."""
        found = {one.content_hash: one for dialogues in self.dialogues for one in dialogues}
        return [found[name] for name in sorted(found)]

    def dialogues_of(self, place: int, whose: Whose) -> "Sequence[Dialogue]":
        """What a target is measured on: its own dialogues, or all; all, too, where it has none of its own."""
        return (self.dialogues[place] if whose == "own" else None) or self.all_dialogues

    def encoded(self, dialogues: "Sequence[Dialogue]") -> "list[Encoded]":
        """Tokens of every dialogue, short ones first.

        Raises:
            UserError: none of them can be read.
        """
        from fusion.dialogues.reader import encode_all

        (tokens,), dropped = encode_all([self.reader], dialogues)
        if not tokens:
            raise UserError(f"none of {len(dialogues)} dialogues to measure on can be read: {dict(dropped)}")
        order = sorted(tokens, key=lambda name: (len(tokens[name].ids_N), name))
        return [tokens[name] for name in order]

    def model(self, folder: Path) -> "PreTrainedModel":
        """The model of a folder, on the accelerator where there is one."""
        from fusion.teaching.causal_lm import load_causal_lm, on_device

        return on_device(load_causal_lm(replace(self.pivot, name=folder.name, path=str(folder), revision=None)))

    def kept(
        self,
        stage: str,
        folders: Sequence[Path],
        dialogues: "Sequence[Dialogue]",
        settings: Mapping[str, object],
        build: Callable[[Path], None],
    ) -> Path:
        """The cached folder of what `build(folder)` measures on these models and dialogues."""
        key = {
            "models": [folder_hash(Path(folder)) for folder in folders],
            "dtype": self.pivot.dtype,
            "tokenizer": self.reader.tokenizer_hash,
            "template": str(self.reader.encoder.template.tokenizer.chat_template),
            "dialogues": fingerprint({"dialogues": [dialogue.to_json() for dialogue in dialogues]}),
            "max_length": self.max_length,
            "batch_tokens": self.batch_tokens,
            "threads": torch.get_num_threads(),
            "cuda": torch.cuda.is_available(),
            "settings": dict(settings),
            "code": code_version(*CODE),
        }
        return cached_folder(self.cache, stage, key, build)


def evidence_of(kind: str, folders: Sequence[Path], dialogues: "Sequence[Sequence[Dialogue]]") -> Evidence:
    """What was measured of each target, in a cached folder of its own; read when it is asked for."""
    name = fingerprint({"kind": kind, "folders": [folder.name for folder in folders]})
    summary = {"kind": kind, "dialogues": [len(own) for own in dialogues]}
    return Evidence(kind, tuple(open_checkpoint(folder) for folder in folders), name, summary)


def tensor_parameters(model: "PreTrainedModel", folder: Path) -> dict[str, Parameter]:
    """The parameters of a loaded model by the names that its folder's files give them.

    Raises:
        UserError: a float tensor of the files goes by another name in the loaded model.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    known = {*parameters, *dict(model.named_buffers(remove_duplicate=False))}
    names = [name for name, spec in open_checkpoint(folder).specs.items() if spec.dtype.is_floating_point]
    strange = [name for name in names if name not in known]
    if strange:
        raise UserError(
            f"{folder}: '{strange[0]}' and {len(strange) - 1} more tensors have other names in transformers' "
            f"{type(model).__name__}, so nothing can be measured of them: merge by a method that needs no dialogues"
        )
    return {name: parameters[name] for name in names if name in parameters}


def total_nll(model: "PreTrainedModel", batch: "Sequence[Encoded]", plain_head: bool) -> Tensor:
    """Nats of all supervised tokens of some dialogues, differentiable by the model's parameters.

    `plain_head`: what `has_plain_head(model)` says; logits then exist for a few supervised rows at a time.
    """
    from fusion.objective.sparse_loss import sparse_cross_entropy
    from fusion.teaching.causal_lm import final_hidden, head, logits_device
    from fusion.teaching.forward import pad, row_index

    device = logits_device(model)
    ids_BT, mask_BT = pad([encoded.ids_N for encoded in batch], device)
    rows_R, references_R = row_index(batch, ids_BT.shape[1], device)
    if not plain_head:
        logits_RV = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits.flatten(0, 1)[rows_R]
        return torch.nn.functional.cross_entropy(logits_RV.float(), references_R, reduction="sum")
    hidden_RH = final_hidden(model, ids_BT, mask_BT).flatten(0, 1)[rows_R]
    ones_R1 = torch.ones(len(rows_R), 1, device=device)
    last = head(model)
    return sparse_cross_entropy(hidden_RH, last.weight, references_R[:, None], ones_R1, bias_V=last.bias)


def require_finite(value: Tensor, what: str, folder: Path) -> None:
    if not math.isfinite(float(value)):
        raise UserError(f"{folder}: {what} is not finite: does the model read these dialogues at all?")
