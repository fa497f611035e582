"""Settings of the built-in tiny world; the defaults are the world `main`."""

from dataclasses import dataclass, field

SKILLS = ("facts", "followup", "add", "units", "translate", "order")
ARCHITECTURES = ("llama", "qwen2", "gpt_neox", "mistral")
TOKENIZERS = ("metaspace", "byte_level")
PIVOT = "pivot"


@dataclass(frozen=True)
class TinyModelConfig:
    """One model of the world: its shape, its tokeniser, and how long it learns what."""

    architecture: str = "llama"
    """Model class: llama, qwen2, gpt_neox or mistral; each has its own chat template and end-of-turn token."""
    tokenizer: str = "metaspace"
    """metaspace (as SentencePiece: marked spaces, byte fallback) or byte_level (as GPT-2)."""
    split_digits: bool = True
    """Whether every digit is a token of its own."""
    vocab_size: int = 800
    """Largest size of the vocabulary, special and byte tokens included."""
    vocab_multiple: int = 1
    """The embedding gets this multiple of rows, more than the tokeniser has tokens, as in many published models."""
    hidden_size: int = 96
    """Width of the residual stream."""
    layers: int = 2
    """Number of decoder layers."""
    heads: int = 4
    """Number of attention heads."""
    key_value_heads: int = 4
    """Number of key-value heads (fewer than heads: grouped-query attention; gpt_neox has none of its own)."""
    strong_skills: list[str] = field(default_factory=list)
    """Skills of which the model reads much clean text; empty for the pivot, which reads all skills alike."""
    steps: int = 400
    """Training steps."""
    learning_rate: float = 2.5e-3
    """Peak learning rate."""


def _models() -> dict[str, TinyModelConfig]:
    return {
        PIVOT: TinyModelConfig(steps=800),
        "tiny_a": TinyModelConfig(
            architecture="qwen2",
            tokenizer="byte_level",
            split_digits=False,
            vocab_size=900,
            vocab_multiple=64,
            key_value_heads=2,
            steps=250,
            strong_skills=["facts", "followup"],
        ),
        "tiny_b": TinyModelConfig(architecture="gpt_neox", vocab_size=720, strong_skills=["add", "units"]),
        "tiny_c": TinyModelConfig(
            architecture="mistral", tokenizer="byte_level", vocab_size=640, strong_skills=["translate", "order"]
        ),
    }


@dataclass(frozen=True)
class WorldConfig:
    """A pivot, its sources and their dialogues, all made on the spot from one seed."""

    name: str = "main"
    """Name of the preset, for reports: main, smoke or alignment."""
    seed: int = 0
    """Seed of everything: knowledge, dialogues, tokenisers, weights, data order."""
    skills: list[str] = field(default_factory=lambda: list(SKILLS))
    """Skills of the world, among facts, followup, add, units, translate, order."""
    sources: list[str] = field(default_factory=lambda: ["tiny_a", "tiny_b", "tiny_c"])
    """Which of `models` are built besides the pivot."""
    models: dict[str, TinyModelConfig] = field(default_factory=_models)
    """The models by name."""

    pivot_noise: float = 0.5
    """Share of answers in the pivot's training text that repeat the misconception instead of the truth."""
    source_noise: float = 0.0
    """The same share in the training text of the sources."""
    corpus_noise: float = 0.4
    """The same share in the corpora that fusion reads (train and heldout)."""

    pivot_dialogues: int = 1000
    """Dialogues per skill from which the pivot learns."""
    strong_dialogues: int = 2000
    """Dialogues from which a source learns each of its strong skills."""
    weak_dialogues: int = 150
    """Dialogues from which a source learns each other skill."""
    train_dialogues: int = 400
    """Dialogues per skill in the fusion corpus; their prompts are all different."""
    heldout_dialogues: int = 60
    """Dialogues per skill, as careless as the fusion corpus, whose prompts occur in no model's training text."""
    test_prompts: int = 120
    """Prompts per skill with the true answer, which occur in no corpus."""
    heldout_share: float = 0.15
    """Share of all prompts, chosen by hash, that is kept for the held-out dialogues."""
    test_share: float = 0.2
    """Share of all prompts, chosen by hash, that is kept for the tests."""

    countries: int = 40
    """Countries in the skills facts and followup; each has a capital, a river and a king."""
    values: int = 24
    """Different capitals (and rivers, and kings) that the countries share."""
    largest_summand: int = 9
    """The skill add sums two numbers from 0 to this."""
    unit_pairs: int = 6
    """Pairs of made-up units in the skill units, each with its own factor."""
    largest_amount: int = 9
    """The skill units converts 1 to this many."""
    words: int = 24
    """Words in the dictionary of the skill translate."""
    items: int = 16
    """Things that the lists of the skill order are made of."""

    shared_template_share: float = 0.5
    """Share of a source's dialogues that it reads in the pivot's chat template instead of its own."""
    tokenizer_dialogues: int = 600
    """Dialogues per skill on which the pivot's tokeniser and, for strong skills, a source's is trained."""
    tokenizer_weak_dialogues: int = 120
    """The same for the other skills of a source."""
    batch_size: int = 32
    """Dialogues per training step."""
    warmup_share: float = 0.05
    """Share of the steps in which the learning rate rises."""
    final_learning_rate_share: float = 0.02
    """Where the cosine of the learning rate ends, as a share of the peak."""
    weight_decay: float = 0.01
    """Weight decay of AdamW."""
    gradient_clip: float = 1.0
    """Largest norm of the gradient."""
    initializer_range: float = 0.1
    """Standard deviation of the random weights that training starts from; smaller ones learn the procedures late."""
