"""What a merge learns from held-out dialogues that a source won: its scale, and what some methods weigh by."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from fusion.config import UserError
from fusion.config.schema import DataConfig, MergeConfig, ModelConfig
from fusion.config.sizes import num_bytes
from fusion.dialogues.dialogue import Dialogue
from fusion.dialogues.reader import encode_all, make_readers
from fusion.evaluation.score import nll_per_byte, take_weights
from fusion.merging import Study
from fusion.teaching.causal_lm import load_causal_lm, on_device
from fusion.tracking.inputs import MergeInputs


def data_with_heldout(inputs: MergeInputs, setting: str, instead: str) -> DataConfig:
    """The data settings of the targets' runs.

    Raises:
        UserError: there are no held-out dialogues that a source won, which `setting` asks for; `instead` says what
            else can be done.
    """
    if inputs.data is None or not inputs.heldout_won:
        raise UserError(
            f"{setting}: there are no held-out dialogues that a source won to work with; {instead}, or targets whose "
            "stage-1 runs had held-out dialogues"
        )
    return inputs.data


def heldout_study(config: MergeConfig, inputs: MergeInputs, method: str) -> Study:
    """What a merge method is to measure on: each target's held-out dialogues that a source of its run won.

    Raises:
        UserError: there are none.
    """
    data = data_with_heldout(inputs, f"merge={method}", "give a method that needs no dialogues")
    return Study(
        pivot=inputs.pivot,
        base=inputs.base,
        targets=[target.path for target in inputs.targets],
        dialogues=inputs.heldout_won_of_targets,
        cache=Path(config.paths.cache),
        max_length=data.max_length,
        batch_tokens=config.evaluation.batch_tokens,
        memory=num_bytes(config.engine.memory),
        seed=config.seed,
    )


def folder_loss(model: ModelConfig, dialogues: Sequence[Dialogue], max_length: int, batch_tokens: int) -> float:
    """Nats per byte of a model's folder on `dialogues`: what a search over settings lowers."""
    (reader,) = make_readers([model], "native", max_length)
    (encoded,), _ = encode_all([reader], dialogues)
    return nll_per_byte(on_device(load_causal_lm(model)), reader.vocab_size, encoded, batch_tokens)


def heldout_loss(
    pivot: ModelConfig, dialogues: Sequence[Dialogue], max_length: int, batch_tokens: int
) -> Callable[[Mapping[str, Tensor]], float]:
    """A function from a state dict of the pivot's shape to nats per byte on `dialogues`, tokenised once."""
    readers = make_readers([pivot], "native", max_length)
    (encoded,), _ = encode_all(readers, dialogues)
    model = on_device(load_causal_lm(pivot))

    def loss(weights: Mapping[str, Tensor]) -> float:
        take_weights(model, weights)
        return nll_per_byte(model, readers[0].vocab_size, encoded, batch_tokens)

    return loss
