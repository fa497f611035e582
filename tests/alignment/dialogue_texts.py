"""Texts that trouble tokenisers, and dialogues of them as token ids of a pair."""

from hypothesis import strategies as st

from fusion.alignment import VocabularyPair

WORDS = [
    "The",
    " ratio",
    " of",
    " poles",
    "calculation",
    " calculated",
    "  ",
    "\n\n",
    " 1:3.",
    "北京",
    "日本語",
    "👍🏽",
    "e\u0301",
]
texts = st.lists(
    st.sampled_from(WORDS) | st.text(st.characters(exclude_characters="▁", exclude_categories=["Cs"]), max_size=4),
    min_size=1,
    max_size=12,
).map("".join)


def encode(pair: VocabularyPair, turns: list[str]) -> tuple[list[int], list[int]]:
    """Every turn, then each side's end of turn, as (pivot ids, source ids)."""
    sides = (pair.pivot_tokenizer, pair.pivot_end_of_turn), (pair.source_tokenizer, pair.source_end_of_turn)
    pivot_ids, source_ids = (
        [token for turn in turns for token in [*tokenizer(turn, add_special_tokens=False).input_ids, end]]
        for tokenizer, end in sides
    )
    return pivot_ids, source_ids
