"""The form of all targets of one training: what rows say, and what happens with mass that no token has."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from fusion.alignment.target_kind import DISTRIBUTION, SPANS, TargetKind
from fusion.config import UserError
from fusion.teaching.sparse_rows import SparseRows, scaled

SCALE, BUCKET = "scale", "bucket"


@dataclass(frozen=True)
class TargetForm:
    kind: TargetKind = field(default_factory=TargetKind)
    tail: str = SCALE
    """scale: rows of tokens are scaled to 1; bucket: what they lack to 1 is the mass of all other tokens together."""

    @property
    def has_tail_bucket(self) -> bool:
        return self.kind.name == DISTRIBUTION and self.tail == BUCKET

    def ready_to_mix(self, rows: SparseRows) -> SparseRows:
        """Rows of one model as they go into a mixture: probabilities of tokens are scaled to 1, unless a bucket has
        the rest. Sorted probabilities and likelihoods stay what they are."""
        return scaled(rows) if self.kind.name == DISTRIBUTION and self.tail == SCALE else rows

    def refuse_level(self, level: str) -> None:
        """Raises UserError for a level of fusion that this kind of targets does not allow."""
        if level == "token" and self.kind.name != DISTRIBUTION:
            raise UserError(
                f"fusion.level=token compares what models give to a pivot token, but this alignment's targets are "
                f"{self.kind.name}, which have no tokens; use fusion.level=dialogue or span, or another alignment"
            )

    def refuse_divergence(self, name: str, temperature: float) -> None:
        """Raises UserError for a divergence between distributions, where targets are none."""
        if self.kind.name != DISTRIBUTION and (name != "forward_kl" or temperature != 1):
            raise UserError(
                f"objective.divergence={name}, objective.temperature={temperature:g}: this alignment's targets are "
                f"{self.kind.name}, which have a distance of their own; leave both out, or use another alignment"
            )

    def refuse_mixture(self) -> None:
        """Raises UserError for kinds whose rows cannot be mixed."""
        if self.kind.name == SPANS:
            raise UserError(
                "fusion.name: this function mixes models, but this alignment's targets are spans, and spans of "
                "different models cannot be mixed; use fusion=min_ce or another that chooses one model, or another "
                "alignment"
            )

    def to_json(self) -> dict[str, object]:
        return {"kind": self.kind.to_json(), "tail": self.tail}

    @classmethod
    def from_json(cls, description: Mapping[str, object]) -> "TargetForm":
        """Raises UserError for a description that this program did not write."""
        kind, tail = description.get("kind"), description.get("tail")
        if not isinstance(kind, Mapping) or tail not in (SCALE, BUCKET):
            raise UserError(f"targets of the form {dict(description)} are not known; prepare them again")
        return cls(TargetKind.from_json(kind), str(tail))
