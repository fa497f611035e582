"""The loss that a scale search lowers: NLL per byte of candidate weights on chosen dialogues."""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from fusion.config.schema import ModelConfig
from fusion.dialogues.dialogue import Dialogue
from fusion.dialogues.reader import encode_all, make_readers
from fusion.evaluation.score import nll_per_byte
from fusion.teaching.causal_lm import load_causal_lm, on_device


def heldout_loss(
    pivot: ModelConfig, dialogues: Sequence[Dialogue], max_length: int, batch_tokens: int
) -> Callable[[Mapping[str, Tensor]], float]:
    """A function from a state dict of the pivot's shape to nats per byte on `dialogues`, tokenised once."""
    readers = make_readers([pivot], "native", max_length)
    (encoded,), _ = encode_all(readers, dialogues)
    model = on_device(load_causal_lm(pivot))

    def loss(weights: Mapping[str, Tensor]) -> float:
        model.load_state_dict(dict(weights), strict=False)  # tied heads are not in the file
        model.tie_weights()
        return nll_per_byte(model, readers[0].vocab_size, encoded, batch_tokens)

    return loss
