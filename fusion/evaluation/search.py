"""What a merge learns from held-out dialogues that a source won: its scale, and what some methods weigh by."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from fusion.config import UserError
from fusion.config.schema import DataConfig, MergeConfig, ModelConfig
from fusion.config.sizes import num_bytes
from fusion.dialogues.dialogue import Dialogue
from fusion.dialogues.encode import Encoded
from fusion.dialogues.reader import Reader, encode_all, make_readers, with_tokenizer
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
    reader, encoded = _read(model, dialogues, max_length)
    return nll_per_byte(on_device(load_causal_lm(model)), reader.vocab_size, encoded, batch_tokens)


def heldout_loss(
    pivot: ModelConfig,
    dialogues: Sequence[Dialogue],
    max_length: int,
    batch_tokens: int,
    tokenizer: Path | None = None,
) -> Callable[[Mapping[str, Tensor]], float]:
    """A function from a state dict of the pivot's shape to nats per byte on `dialogues`, tokenised once.

    Where the state has other rows for tokens than the pivot, `tokenizer` is the folder of the tokeniser that fits it.
    """
    reader, encoded = _read(with_tokenizer(pivot, tokenizer), dialogues, max_length)
    model = on_device(load_causal_lm(pivot))

    def loss(weights: Mapping[str, Tensor]) -> float:
        take_weights(model, weights)
        return nll_per_byte(model, reader.vocab_size, encoded, batch_tokens)

    return loss


def _read(model: ModelConfig, dialogues: Sequence[Dialogue], max_length: int) -> tuple[Reader, Mapping[str, Encoded]]:
    """The dialogues as `model` reads them.

    Raises:
        UserError: it can render none of them, for instance since each spells one of its special tokens.
    """
    (reader,) = make_readers([model], "native", max_length)
    (encoded,), dropped = encode_all([reader], dialogues)
    if dialogues and not encoded:
        reasons = ", ".join(f"{reason} ({count})" for reason, count in dropped.items())
        raise UserError(
            f"none of the {len(dialogues)} held-out dialogues that a source won can be read with the merged model's "
            f"tokeniser: {reasons}; give a number for merge.scale and leave search_value out"
        )
    return reader, encoded
