"""Scorers that read dialogues with known answers, without generating: world skills and held-out loss."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fusion.dialogues.dialogue import Dialogue
from fusion.evaluation.candidate import Candidate
from fusion.evaluation.score import NO_CATEGORY, Scores, score_folder, score_model
from fusion.evaluation.sheet import ScoredItem, ScoreSheet


@dataclass(frozen=True)
class Readings:
    """The dialogues of both scorers: a model reads them once for the two."""

    test: Sequence[Dialogue]
    """Their last assistant turn is the right answer."""
    heldout: Sequence[Dialogue]
    batch_tokens: int
    cache: Path

    def of(self, candidate: Candidate) -> Scores:
        """Scores of `candidate`; those of a folder are kept in the cache."""
        reader = candidate.reader
        if candidate.live is None:
            return score_folder(reader, self.test, self.heldout, self.batch_tokens, self.cache)
        module, encoder = candidate.module(), reader.encoder
        return score_model(module, encoder, reader.vocab_size, self.test, self.heldout, self.batch_tokens)


@dataclass(frozen=True)
class Skills:
    """Share of right greedy answers, by skill; the average weighs every skill alike."""

    readings: Readings
    seed: int = 0
    name: str = "skills"

    def score(self, candidate: Candidate) -> ScoreSheet:
        right = self.readings.of(candidate).items
        named = {dialogue.content_hash: dialogue.category or NO_CATEGORY for dialogue in self.readings.test}
        items = tuple(ScoredItem(name, named[name], self.seed, float(one)) for name, one in right.items())
        return ScoreSheet(self.name, candidate.name, items, "% right", 100.0, by_category=True)


@dataclass(frozen=True)
class Heldout:
    """Nats per byte of the assistant's text in held-out dialogues, by category; less is better."""

    readings: Readings
    seed: int = 0
    name: str = "heldout"

    def score(self, candidate: Candidate) -> ScoreSheet:
        losses = self.readings.of(candidate).heldout
        named = {dialogue.content_hash: dialogue.category or NO_CATEGORY for dialogue in self.readings.heldout}
        items = tuple(
            ScoredItem(name, named[name], self.seed, nats / size, size) for name, (nats, size) in losses.items()
        )
        return ScoreSheet(self.name, candidate.name, items, "nats/byte", more_is_better=False)
