"""A model whose weights stay in their files until a part of it asks for them.

So a process that keeps a shard of every layer never holds more than one whole layer in memory.
"""

from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from fusion.config.schema import ModelConfig
from fusion.teaching.causal_lm import load_causal_lm


@dataclass(frozen=True)
class StoredWeights:
    """Weights as they lie in their files, by the tensors that are to hold them.

    What transformers has to convert (experts of mixtures that are stored one by one) is in memory, in the dtype of the
    files; all else is mapped, and read when it is copied.
    """

    stored: dict[Tensor, Tensor]

    @torch.no_grad()
    def fill(self, module: torch.nn.Module) -> None:
        """Copy what `module` still lacks, in its own precision. Shards lack nothing: they are other tensors."""
        for own in chain(module.parameters(), module.buffers()):
            if own in self.stored:
                own.copy_(self.stored.pop(own))


def map_model(settings: ModelConfig) -> tuple[PreTrainedModel, PreTrainedModel, StoredWeights]:
    """A float32 model whose weights take no memory yet, the model in the files' dtype, and what fills the first one.

    Raises:
        UserError: the model cannot be loaded.
    """
    mapped = load_causal_lm(settings, dtype="auto")
    with no_init_weights():  # pages of tensors that nobody writes do not exist
        empty = type(mapped)(mapped.config)
    empty.tie_weights()
    empty.generation_config = mapped.generation_config
    sources = mapped.state_dict()
    own = empty.state_dict(keep_vars=True)
    assert own.keys() == sources.keys(), "one class, one config"
    return empty, mapped, StoredWeights({tensor: sources[name] for name, tensor in own.items()})
