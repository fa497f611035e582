"""Products of what goes into linear layers. Tensor legend: T tokens, C inputs of a layer."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import Linear

from fusion.cache import write_json
from fusion.merging.checkpoints.checkpoint import INDEX_FILE
from fusion.merging.evidence import Evidence
from fusion.merging.measuring.study import Study, Whose, evidence_of, require_finite, tensor_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fusion.dialogues.dialogue import Dialogue
    from fusion.dialogues.encode import Encoded

STAGE = "input_products"


def input_products(study: Study, *, dialogues: Whose = "own") -> Evidence:
    """Gram matrices of the inputs of linear layers: the mean over tokens of x x^T, float32 [C, C].

    Of every token that a layer reads, under the name of the layer's weight; of the head, of supervised rows. A head
    that is also the embedding table has none. `dialogues`: those of each target's own run, or all. As many layers
    as fit `study.memory` are measured in one pass over the dialogues.
    """
    chosen = [study.dialogues_of(place, dialogues) for place in range(len(study.targets))]
    folders = [
        study.kept(STAGE, [target], own, {}, partial(_measure, study, target, own))
        for target, own in zip(study.targets, chosen, strict=True)
    ]
    return evidence_of(input_products.__name__, folders, chosen)


@torch.no_grad()
def _measure(study: Study, target: Path, dialogues: "Sequence[Dialogue]", out: Path) -> None:
    model, encoded = study.model(target), study.encoded(dialogues)
    layers = _linear_layers(model, target)
    homes: dict[str, str] = {}
    for place, group in enumerate(_groups(layers, study.memory)):
        grams = _grams(model, {name: layers[name] for name in group}, encoded, study.batch_tokens)
        for name, gram_CC in grams.items():
            require_finite(gram_CC.trace(), f"the input of '{name}'", target)
        shard = f"products-{place:05}.safetensors"
        save_file(grams, out / shard)
        homes |= dict.fromkeys(grams, shard)
    write_json(out / INDEX_FILE, {"metadata": {}, "weight_map": homes})


def _linear_layers(model: "PreTrainedModel", target: Path) -> dict[str, Linear]:
    """Linear layers by the names of their weights in the files; those whose weight is an embedding table apart."""
    table = model.get_input_embeddings().weight
    modules = dict(model.named_modules())
    return {
        name: module
        for name, parameter in tensor_parameters(model, target).items()
        if isinstance(module := modules.get(name.removesuffix(".weight")), Linear)
        and module.weight is parameter
        and parameter is not table
    }


def _groups(layers: Mapping[str, Linear], memory: int) -> Iterator[list[str]]:
    """Names of layers whose products fit into `memory` bytes together; at least one."""
    group: list[str] = []
    held = 0
    for name, layer in layers.items():
        needed = 4 * layer.in_features**2
        if group and held + needed > memory:
            yield group
            group, held = [], 0
        group.append(name)
        held += needed
    if group:
        yield group


def _grams(
    model: "PreTrainedModel", layers: Mapping[str, Linear], encoded: "Sequence[Encoded]", batch_tokens: int
) -> dict[str, Tensor]:
    from fusion.teaching.causal_lm import final_hidden, head, logits_device
    from fusion.teaching.forward import pad, row_index

    device, last = logits_device(model), head(model)
    sums = {
        name: torch.zeros(layer.in_features, layer.in_features, device=layer.weight.device)
        for name, layer in layers.items()
    }
    hooks = [
        layer.register_forward_pre_hook(_adder(sums[name])) for name, layer in layers.items() if layer is not last
    ]
    num_tokens = num_rows = 0
    try:
        for batch in _unpadded(encoded, batch_tokens):
            ids_BT, mask_BT = pad([one.ids_N for one in batch], device)
            hidden = final_hidden(model, ids_BT, mask_BT).flatten(0, 1)
            rows_R, _ = row_index(batch, ids_BT.shape[1], device)
            for name in (name for name, layer in layers.items() if layer is last):
                _add(sums[name], hidden[rows_R])
            num_tokens, num_rows = num_tokens + ids_BT.numel(), num_rows + len(rows_R)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: (sum_CC / (num_rows if layers[name] is last else num_tokens)).cpu() for name, sum_CC in sums.items()}


def _unpadded(encoded: "Sequence[Encoded]", batch_tokens: int) -> "Iterator[list[Encoded]]":
    """Batches of dialogues of one length, since a layer reads padding, too."""
    for length, group in groupby(encoded, key=lambda one: len(one.ids_N)):
        alike = list(group)
        step = max(1, batch_tokens // length)
        yield from (alike[start : start + step] for start in range(0, len(alike), step))


def _adder(sum_CC: Tensor) -> Callable[[torch.nn.Module, tuple[Tensor, ...]], None]:
    return lambda module, inputs: _add(sum_CC, inputs[0])


def _add(sum_CC: Tensor, inputs: Tensor) -> None:
    inputs_TC = inputs.reshape(-1, inputs.shape[-1]).float()
    sum_CC.addmm_(inputs_TC.T, inputs_TC)
