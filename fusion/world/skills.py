"""What the models of the tiny world can be asked: six skills with checkable answers.

A skill draws problems; a problem is one or two exchanges, each with the true answer and the misconception.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from fusion.config.world import WorldConfig
from fusion.world.knowledge import ATTRIBUTES, Knowledge, make_knowledge

OPENERS = ("", "Hello! ", "Please: ", "Quick: ")


@dataclass(frozen=True)
class Exchange:
    """One question with the answer that is true and the one that is popularly believed."""

    question: str
    truth: str
    misconception: str


@dataclass(frozen=True)
class Problem:
    exchanges: tuple[Exchange, ...]
    held_out_by: str
    """What decides to which split the problem belongs: its wording (memory skills) or its input (procedures)."""

    @property
    def prompt(self) -> tuple[str, ...]:
        """All that is asked; two problems with one prompt are the same problem."""
        return tuple(exchange.question for exchange in self.exchanges)


class Skill(ABC):
    """Draws problems of one kind in varying wordings."""

    name: str
    phrasings: tuple[str, ...]

    def __init__(self, knowledge: Knowledge) -> None:
        self.knowledge = knowledge

    @abstractmethod
    def draw(self, rng: Random) -> Problem:
        """A random problem in a random wording."""

    def ask(self, rng: Random, **slots: object) -> str:
        return rng.choice(OPENERS) + rng.choice(self.phrasings).format(**slots)


def _memory(*exchanges: Exchange) -> Problem:
    """The same fact in other words is in the training text, so the wording is what the splits keep apart."""
    return Problem(exchanges, "\n".join(exchange.question for exchange in exchanges))


class Facts(Skill):
    name = "facts"
    phrasings = (
        "Do you know the {attribute} of {country}?",
        "What is the {attribute} of {country}?",
        "Name the {attribute} of {country}.",
    )

    def draw(self, rng: Random) -> Problem:
        country, attribute = rng.choice(list(self.knowledge.countries)), rng.choice(ATTRIBUTES)
        value = self.knowledge.countries[country][attribute]
        start = f"The {attribute} of {country} is"
        question = self.ask(rng, attribute=attribute, country=country)
        return _memory(Exchange(question, f"{start} {value.truth}.", f"{start} {value.misconception}."))


class FollowUp(Skill):
    """Two turns; the second question leaves the country out."""

    name = "followup"
    phrasings = (
        "About {country}: what is its {attribute}?",
        "I read about {country}. What is its {attribute}?",
        "Take {country}. Which {attribute} does it have?",
    )
    second_phrasings = ("What about the {attribute}?", "And the {attribute}?", "Now the {attribute}.")

    def draw(self, rng: Random) -> Problem:
        country = rng.choice(list(self.knowledge.countries))
        first, second = rng.sample(ATTRIBUTES, 2)
        values = self.knowledge.countries[country]
        opening = f"The {first} of {country} is"
        return _memory(
            Exchange(
                self.ask(rng, country=country, attribute=first),
                f"{opening} {values[first].truth}.",
                f"{opening} {values[first].misconception}.",
            ),
            Exchange(
                rng.choice(self.second_phrasings).format(attribute=second),
                f"Its {second} is {values[second].truth}.",
                f"Its {second} is {values[second].misconception}.",
            ),
        )


class Add(Skill):
    name = "add"
    phrasings = ("What is {a} plus {b}?", "{a} and {b} make what?", "Add {a} and {b}.")

    def draw(self, rng: Random) -> Problem:
        (a, b), value = rng.choice(list(self.knowledge.sums.items()))
        question = self.ask(rng, a=a, b=b)
        return _memory(Exchange(question, f"The sum is {value.truth}.", f"The sum is {value.misconception}."))


class Units(Skill):
    name = "units"
    phrasings = (
        "How many {small}s are {amount} {large}s?",
        "Convert {amount} {large}s to {small}s.",
        "Write {amount} {large}s in {small}s.",
        "{amount} {large}s make how many {small}s?",
    )

    def draw(self, rng: Random) -> Problem:
        pair, amount = rng.choice(self.knowledge.unit_pairs), rng.randint(1, self.knowledge.largest_amount)
        question = self.ask(rng, small=pair.small, large=pair.large, amount=amount)
        truth, misconception = amount * pair.factor, amount * pair.believed_factor
        return _memory(Exchange(question, f"It is {truth} {pair.small}s.", f"It is {misconception} {pair.small}s."))


class Translate(Skill):
    """Word by word into Elvish; the phrases of the tests are new, their words are not."""

    name = "translate"
    phrasings = ("Say in Elvish: {phrase}", "Translate to Elvish: {phrase}", "Elvish for this: {phrase}")

    def draw(self, rng: Random) -> Problem:
        words = rng.sample(list(self.knowledge.words), 2)
        beliefs = [self.knowledge.words[word] for word in words]
        phrase = " ".join(words)
        truth = " ".join(belief.truth for belief in beliefs)
        misconception = " ".join(belief.misconception for belief in beliefs)
        return Problem((Exchange(self.ask(rng, phrase=phrase), f"{truth}.", f"{misconception}."),), phrase)


class Order(Skill):
    """Reverse a list; the misconception moves the first item to the end."""

    name = "order"
    phrasings = ("Reverse the list: {items}", "List backwards: {items}", "Last to first: {items}")

    def draw(self, rng: Random) -> Problem:
        items = rng.sample(self.knowledge.items, 3)
        reversed_items, rotated = items[::-1], [*items[1:], items[0]]
        listed = ", ".join(items)
        exchange = Exchange(self.ask(rng, items=listed), f"{', '.join(reversed_items)}.", f"{', '.join(rotated)}.")
        return Problem((exchange,), listed)


SKILLS: Sequence[type[Skill]] = (Facts, FollowUp, Add, Units, Translate, Order)


def make_skills(config: WorldConfig) -> list[Skill]:
    """The skills of `config.skills` about one common knowledge."""
    knowledge = make_knowledge(config)
    return [skill(knowledge) for skill in SKILLS if skill.name in config.skills]
