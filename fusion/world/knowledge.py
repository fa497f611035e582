"""What is true in the tiny world, and what is popularly believed instead.

Every item has one true answer and one fixed false one, its misconception. Careless text repeats the misconception;
because it is always the same one, a model cannot outvote it by reading more of the same text.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

from fusion.config.world import WorldConfig

ATTRIBUTES = ("capital", "river", "king")
# fmt: off
WORDS = [
    "boat", "drinks", "forest", "sings", "river", "waits", "tower", "sleeps", "horse", "burns", "silver",
    "falls", "window", "turns", "garden", "grows", "letter", "hides", "bridge", "shines", "winter", "ends",
    "dragon", "runs", "mirror", "breaks", "candle", "flies", "stone", "walks", "island", "opens", "shadow",
    "moves",
]
ITEMS = [
    "moon", "urn", "queen", "cat", "lamp", "drum", "rose", "fish", "coin", "harp", "wolf", "pear", "ring",
    "boot", "star", "kite", "bell", "oak", "nest", "plum", "gate", "crow",
]
ONSETS = [
    "b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "br", "dr", "gl", "kr", "pl", "st",
    "tr", "vl",
]
VOWELS = [
    "a", "e", "i", "o", "u", "ai", "ei",
]
# fmt: on
CODAS = ("", "", "n", "r", "l", "k", "s")
FACTORS = range(2, 10)
MISTAKES = (-2, -1, 1, 2)


@dataclass(frozen=True)
class Belief:
    """The two answers to one question."""

    truth: str
    misconception: str


@dataclass(frozen=True)
class UnitPair:
    """`factor` small units make one large unit; `believed_factor` is the misconception."""

    small: str
    large: str
    factor: int
    believed_factor: int


@dataclass(frozen=True)
class Knowledge:
    countries: dict[str, dict[str, Belief]]
    """Country -> attribute -> its value."""
    sums: dict[tuple[int, int], Belief]
    """Summands -> their sum."""
    unit_pairs: list[UnitPair]
    largest_amount: int
    """Units are converted in amounts of 1 to this."""
    words: dict[str, Belief]
    """English word -> Elvish word; the misconception is a false friend, the translation of another word."""
    items: list[str]


def make_knowledge(config: WorldConfig) -> Knowledge:
    """Draw the whole world from `config.seed`."""
    rng = Random(f"{config.seed}/knowledge")
    names = _names(rng)
    countries = [next(names) for _ in range(config.countries)]
    values = {attribute: [next(names) for _ in range(config.values)] for attribute in ATTRIBUTES}
    units = [(next(names).lower(), next(names).lower()) for _ in range(config.unit_pairs)]
    elvish = [next(names).lower() for _ in range(config.words)]
    return Knowledge(
        countries={
            country: {attribute: Belief(*rng.sample(values[attribute], 2)) for attribute in ATTRIBUTES}
            for country in countries
        },
        sums=_sums(rng, config.largest_summand),
        unit_pairs=[UnitPair(small, large, *rng.sample(FACTORS, 2)) for small, large in units],
        largest_amount=config.largest_amount,
        words=_false_friends(rng, rng.sample(WORDS, config.words), elvish),
        items=rng.sample(ITEMS, config.items),
    )


def _names(rng: Random) -> Iterator[str]:
    """Made-up names of two or three syllables, never the same twice."""
    seen: set[str] = set()
    while True:
        syllables = (rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(rng.choice((2, 2, 3))))
        name = "".join(syllables).capitalize() + rng.choice(CODAS)
        if name not in seen:
            seen.add(name)
            yield name


def _sums(rng: Random, largest: int) -> dict[tuple[int, int], Belief]:
    sums = {}
    for a in range(largest + 1):
        for b in range(largest + 1):
            believed = a + b + rng.choice([mistake for mistake in MISTAKES if a + b + mistake >= 0])
            sums[a, b] = Belief(str(a + b), str(believed))
    return sums


def _false_friends(rng: Random, english: Sequence[str], elvish: Sequence[str]) -> dict[str, Belief]:
    """Pair every word with its translation and, around one big circle, with the translation of another word."""
    circle = list(range(len(english)))
    rng.shuffle(circle)
    friend = {circle[i]: circle[i - 1] for i in range(len(circle))}
    return {word: Belief(elvish[i], elvish[friend[i]]) for i, word in enumerate(english)}
