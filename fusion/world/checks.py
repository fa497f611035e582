"""What can be wrong with the settings of a world, all of it at once."""

from collections.abc import Iterator

from fusion.config.world import ARCHITECTURES, PIVOT, SKILLS, TOKENIZERS, TinyModelConfig, WorldConfig
from fusion.world.knowledge import ITEMS, WORDS

SMALLEST_VOCABULARY = 300  # all bytes, special tokens, and some pieces to learn
RANGES = {
    "pivot_noise": (0, 1),
    "source_noise": (0, 1),
    "corpus_noise": (0, 1),
    "shared_template_share": (0, 1),
    "heldout_share": (0, 1),
    "test_share": (0, 1),
    "countries": (1, 1000),
    "values": (2, 1000),
    "largest_summand": (0, 99),
    "unit_pairs": (1, 100),
    "largest_amount": (1, 99),
    "words": (3, len(WORDS)),
    "items": (3, len(ITEMS)),
    "batch_size": (1, 100_000),
}


def check_world(config: WorldConfig) -> list[str]:
    """Every reason why `config` cannot be built, as a sentence with the key and what to do."""
    return [*_ranges(config), *_names(config), *_models(config)]


def _ranges(config: WorldConfig) -> Iterator[str]:
    for key, (low, high) in RANGES.items():
        value = getattr(config, key)
        if not low <= value <= high:
            yield f"world.{key}={value}: give a value from {low} to {high}"
    if config.heldout_share + config.test_share >= 1:
        yield "world.heldout_share and world.test_share leave no prompts for training; their sum must be below 1"


def _names(config: WorldConfig) -> Iterator[str]:
    yield from _unknown("world.skills", config.skills, SKILLS)
    yield from _unknown("world.sources", config.sources, [name for name in config.models if name != PIVOT])
    if not config.skills:
        yield f"world.skills is empty; give at least one of {', '.join(SKILLS)}"
    if PIVOT not in config.models:
        yield f"world.models has no {PIVOT}; every world needs one"


def _models(config: WorldConfig) -> Iterator[str]:
    for name, model in config.models.items():
        where = f"world.models.{name}"
        yield from _unknown(f"{where}.architecture", [model.architecture], ARCHITECTURES)
        yield from _unknown(f"{where}.tokenizer", [model.tokenizer], TOKENIZERS)
        yield from _unknown(f"{where}.strong_skills", model.strong_skills, SKILLS)
        yield from _shape(where, model)


def _shape(where: str, model: TinyModelConfig) -> Iterator[str]:
    if model.vocab_size < SMALLEST_VOCABULARY:
        yield f"{where}.vocab_size={model.vocab_size}: give at least {SMALLEST_VOCABULARY}"
    if model.heads < 1 or model.hidden_size % (2 * model.heads):
        yield f"{where}.hidden_size={model.hidden_size}: give a multiple of twice the number of heads ({model.heads})"
    if model.key_value_heads < 1 or model.heads % model.key_value_heads:
        yield f"{where}.key_value_heads={model.key_value_heads}: give a divisor of the number of heads ({model.heads})"
    for key in ("layers", "steps", "vocab_multiple"):
        if getattr(model, key) < 1:
            yield f"{where}.{key}={getattr(model, key)}: give at least 1"


def _unknown(where: str, given: list[str], known: list[str] | tuple[str, ...]) -> Iterator[str]:
    for name in given:
        if name not in known:
            yield f"{where}: there is no {name!r}; choose among {', '.join(known)}"
