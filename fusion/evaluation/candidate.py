"""A model to score: a folder, a hub id, or a live module with its tokeniser."""

import hashlib
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from fusion.config.schema import ModelConfig
from fusion.dialogues.reader import Reader, scoring_reader
from fusion.teaching.causal_lm import load_causal_lm, on_device


@dataclass
class Candidate:
    """What scorers are given. Weights are loaded when a scorer first asks for them."""

    reader: Reader
    live: PreTrainedModel | None = None
    _loaded: PreTrainedModel | None = field(default=None, repr=False)
    _identity: str = field(default="", repr=False)

    @classmethod
    def of_folder(
        cls, model: ModelConfig, pivot: ModelConfig | None = None, max_length: int | None = None
    ) -> "Candidate":
        """The model of a folder or hub id; one without a chat template reads the rendering of `pivot`.

        Raises UserError for tokenisers or chat templates that cannot be used.
        """
        return cls(scoring_reader(model, pivot or model, max_length))

    @property
    def name(self) -> str:
        return self.reader.model.name

    @property
    def identity(self) -> str:
        """Names the weights: the folder's hash or hub id, or for a live module a hash of its tensors."""
        if self.live is None:
            return self.reader.identity
        if not self._identity:
            self._identity = _weights_hash(self.live)
        return self._identity

    def module(self) -> PreTrainedModel:
        """The model in evaluation mode, on the first accelerator unless it is live already."""
        if self.live is not None:
            return self.live.eval()
        if self._loaded is None:
            self._loaded = on_device(load_causal_lm(self.reader.model))
        return self._loaded

    def release(self) -> None:
        """Forget weights that were loaded here, so that the next model has room."""
        self._loaded = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _weights_hash(model: PreTrainedModel) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(
            tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        )
    return f"live:{digest.hexdigest()}"
