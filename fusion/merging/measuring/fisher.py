from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor

from fusion.merging.evidence import Evidence
from fusion.merging.measuring.study import (
    Study,
    Whose,
    evidence_of,
    require_finite,
    tensor_parameters,
    total_nll,
)

if TYPE_CHECKING:
    from fusion.dialogues.dialogue import Dialogue

STAGE = "squared_gradients"


def squared_gradients(study: Study, *, dialogues: Whose = "own") -> Evidence:
    """Diagonal of the empirical Fisher information: the mean over dialogues of (d NLL of a dialogue / d weight)^2.

    float32, in each tensor's shape. The reference tokens stand for labels drawn from the model, as is usual for
    language models (https://arxiv.org/abs/2111.09832, section 3). `dialogues`: those of each target's own run, or all.
    """
    chosen = [study.dialogues_of(place, dialogues) for place in range(len(study.targets))]
    folders = [
        study.kept(STAGE, [target], own, {}, partial(_measure, study, target, own))
        for target, own in zip(study.targets, chosen, strict=True)
    ]
    return evidence_of(squared_gradients.__name__, folders, chosen)


def _measure(study: Study, target: Path, dialogues: "Sequence[Dialogue]", out: Path) -> None:
    from fusion.teaching.causal_lm import has_plain_head

    model = study.model(target)
    plain, encoded = has_plain_head(model), study.encoded(dialogues)
    parameters = tensor_parameters(model, target)
    sums = {id(one): torch.zeros_like(one, dtype=torch.float32) for one in parameters.values()}

    def take(parameter: Tensor) -> None:
        """Called once its gradient is complete, which then goes at once."""
        assert parameter.grad is not None
        sums[id(parameter)].addcmul_(parameter.grad.float(), parameter.grad.float())
        parameter.grad = None

    for parameter in {id(one): one for one in parameters.values()}.values():  # tied ones have two names
        parameter.register_post_accumulate_grad_hook(take)
    for one in encoded:
        total_nll(model, [one], plain).backward()
    means = {name: (sums[id(parameter)] / len(encoded)).cpu() for name, parameter in parameters.items()}
    for name, mean in means.items():
        require_finite(mean.sum(), f"the squared gradient of '{name}'", target)
    save_file(means, out / "squared_gradients.safetensors")
