"""What kind of text a token is: the rows of the alignment's report are told apart by it.

Legend: R rows.
"""

import re
import unicodedata

import numpy as np

from fusion.dialogues.token_bytes import TokenBytes

CATEGORIES = ("letters", "digits", "white space", "CJK", "code", "markup", "punctuation", "other")
"""
- `letters`: letters of any alphabet but CJK, accents that stand alone included.
- `digits`: digits and other numerals.
- `white space`: nothing but white space.
- `CJK`: Chinese, Japanese and Korean characters, their punctuation and full-width forms.
- `code`: operators, brackets, underscores, and ASCII punctuation with one of them in it, such as `});` or `->`.
- `markup`: ends of turn and other events, parts of tags (`</`, `<br`, `/>`), marks of Markdown (`**`, `##`, three
  backticks, `](`, rules).
- `punctuation`: punctuation of any other kind.
- `other`: symbols, emoji, and bytes that are no whole character.

A token of several kinds is what most of its characters are, white space apart; of as many, what comes first.
"""
LETTERS, DIGITS, WHITE_SPACE, CJK, CODE, MARKUP, PUNCTUATION, OTHER = range(len(CATEGORIES))

CODE_SIGNS = frozenset("_+*/=<>|\\&^~%$@#`{}[]()")
MARKS = re.compile(r"</?[A-Za-z!][^<>]*/?>?|</|/>|-->|#{1,6}|\*{2,3}|~~|`{1,3}|-{3,}|={3,}|!?\[\]\(?|\]\(|!\[")
CJK_RANGES = (
    (0x1100, 0x11FF),  # Hangul letters
    (0x2E80, 0x303F),  # radicals, CJK punctuation
    (0x3040, 0x33FF),  # kana, Bopomofo, Hangul letters, enclosed and squared characters
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xA960, 0xA97F),
    (0xAC00, 0xD7FF),  # Hangul
    (0xF900, 0xFAFF),
    (0xFF00, 0xFFEF),  # full-width and half-width forms
    (0x20000, 0x3FFFF),
)
VARIATION_SELECTORS = range(0xFE00, 0xFE10)
KIND_OF_UNICODE = {"L": LETTERS, "M": LETTERS, "N": DIGITS, "P": PUNCTUATION}


def category(content: bytes) -> int:
    """Place in `CATEGORIES` of a token that spells `content`; a token without any is an event."""
    if not content:
        return MARKUP
    text = content.decode("utf-8", "ignore")
    bare = text.strip()
    if not bare:
        return WHITE_SPACE if text else OTHER
    if MARKS.fullmatch(bare):
        return MARKUP
    kinds = [_kind(character) for character in bare if not character.isspace()]
    if CODE in kinds and bare.isascii() and {CODE, PUNCTUATION} >= set(kinds):
        return CODE
    return max(kinds, key=kinds.count)  # the first of several that come as often


def _kind(character: str) -> int:
    code = ord(character)
    if character in CODE_SIGNS:
        return CODE
    if any(first <= code <= last for first, last in CJK_RANGES):
        return CJK
    if code in VARIATION_SELECTORS:
        return OTHER
    return KIND_OF_UNICODE.get(unicodedata.category(character)[0], OTHER)


class TokenCategories:
    """The category of one tokeniser's tokens, each looked at once."""

    def __init__(self, table: TokenBytes) -> None:
        self._table = table
        self._known: dict[int, int] = {}

    def __call__(self, ids_R: np.ndarray) -> np.ndarray:
        """int8 [R]: places in `CATEGORIES`."""
        tokens, inverse_R = np.unique(ids_R, return_inverse=True)
        return np.array([self[token] for token in tokens.tolist()], dtype=np.int8)[inverse_R]

    def __getitem__(self, token: int) -> int:
        found = self._known.get(token)
        if found is None:
            found = self._known[token] = category(self._table[token])
        return found
