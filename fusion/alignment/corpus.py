"""The dialogues of one pair of readers, in the order and the shards in which they are aligned."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fusion.alignment.rows import Rows
from fusion.dialogues.encode import Encoded, corpus_hash
from fusion.dialogues.reader import Reader


@dataclass(frozen=True)
class Text:
    """One dialogue as both models read it."""

    pivot: Encoded
    source: Encoded

    def all_rows(self) -> tuple[Rows, Rows]:
        return Rows.of(self.pivot.ids_N, self.pivot.ends_N), Rows.of(self.source.ids_N, self.source.ends_N)

    def supervised_rows(self) -> tuple[Rows, Rows]:
        return (
            Rows.of(self.pivot.ids_N, self.pivot.ends_N, self.pivot.rows_R),
            Rows.of(self.source.ids_N, self.source.ends_N, self.source.rows_R),
        )


@dataclass(frozen=True, eq=False, repr=False)
class Corpus:
    """Dialogues by content hash, as the pivot and one source read them."""

    pivot: Reader
    source: Reader
    pivot_tokens: Mapping[str, Encoded]
    source_tokens: Mapping[str, Encoded]
    names: Sequence[str]
    """Content hashes, ascending, each once."""

    def __getitem__(self, name: str) -> Text:
        return Text(self.pivot_tokens[name], self.source_tokens[name])

    def shards(self, size: int) -> list[Sequence[str]]:
        """Runs of `size` dialogues."""
        return [self.names[start : start + size] for start in range(0, len(self.names), size)]

    def first(self, count: int) -> "Corpus":
        """The `count` dialogues with the lowest content hashes."""
        return Corpus(self.pivot, self.source, self.pivot_tokens, self.source_tokens, self.names[:count])

    def key(self) -> dict[str, object]:
        """What a result that depends on tokenisers and tokens alone is cached under."""
        return {
            "pivot": self.pivot.tokenizer_hash,
            "source": self.source.tokenizer_hash,
            "pivot_tokens": corpus_hash({name: self.pivot_tokens[name] for name in self.names}),
            "source_tokens": corpus_hash({name: self.source_tokens[name] for name in self.names}),
        }
