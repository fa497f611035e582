"""The head of a model of transformers, with all that the model does to its logits behind it.

Tensor legend: B dialogues, T tokens, H hidden size.
"""

from torch import Tensor
from torch.nn.functional import linear
from transformers import PreTrainedModel

from fusion.objective.head import Head
from fusion.teaching.causal_lm import explains_logits, head

FACTORS = ("logit_scale", "lm_head_multiplier")
"""Settings of a model's config that multiply logits: Cohere, Falcon-H1."""
DIVISORS = ("logits_scaling",)
"""Those that divide them: Granite."""
SOFTCAPS = ("final_logit_softcapping", "output_logit_soft_cap")
"""Bounds of logits, null where there is none: Gemma, xLSTM."""


def read_head(model: PreTrainedModel) -> Head:
    """The head of `model`, with the scale and the soft cap that its config tells of.

    They are known by the names of the settings alone: `has_known_head` says whether that is all.
    """
    module, config = head(model), model.config.get_text_config()
    scale = 1.0
    for name in FACTORS:
        scale *= getattr(config, name, None) or 1.0
    for name in DIVISORS:
        scale /= getattr(config, name, None) or 1.0
    softcaps = [getattr(config, name, None) for name in SOFTCAPS]
    return Head(module.weight, module.bias, scale, next((cap for cap in softcaps if cap), None))


def has_known_head(model: PreTrainedModel) -> bool:
    """Whether `read_head` explains the logits that the model's own forward gives."""
    known = read_head(model)

    def logits_of(hidden_BTH: Tensor) -> Tensor:
        return known.logits(linear(hidden_BTH, known.weight_VH))

    return explains_logits(model, logits_of)
