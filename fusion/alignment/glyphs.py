"""Text made visible: white space and control characters as signs, what cannot be seen by its name, bytes as `<0xNN>`.

A blank never stands for anything, so it can fill up columns.
"""

from rich.cells import cell_len

CUT, OPEN, CLOSE = "│", "⟦", "⟧"
CONTROL_PICTURES, DELETE, LAST_CONTROL = 0x2400, 0x7F, 0x20
SIGNS = {chr(code): chr(CONTROL_PICTURES + code) for code in range(LAST_CONTROL)} | {
    chr(DELETE): "␡",
    " ": "·",
    "\n": "⏎",
    "\t": "⇥",
}
OWN = frozenset({CUT, OPEN, CLOSE, *SIGNS.values()})
"""What has a meaning here is named where the text itself has it."""
VARIATION_SELECTORS = range(0xFE00, 0xFE10)
FIRST_STRAY, LAST_STRAY = 0xDC80, 0xDCFF  # how "surrogateescape" decodes the bytes 0x80 to 0xFF


def apart(name: str) -> str:
    """How something is written that is no text: special tokens, spaces that the tokeniser adds."""
    return f"{OPEN}{name}{CLOSE}"


def hexed(content: bytes) -> str:
    """Bytes that are no whole character."""
    return "".join(f"<0x{byte:02X}>" for byte in content)


def glyph(character: str) -> str:
    """One character that stands alone; never of no width."""
    if character in SIGNS:
        return SIGNS[character]
    if FIRST_STRAY <= ord(character) <= LAST_STRAY:
        return hexed(character.encode("utf-8", "surrogateescape"))
    return character if is_plain(character) and cell_len(character) else f"<U+{ord(character):04X}>"


def is_plain(character: str) -> bool:
    """Whether a character is written as it is; others may join it (`is_mark`)."""
    hidden = character in SIGNS or character in OWN or ord(character) in VARIATION_SELECTORS
    return character.isprintable() and not hidden


def is_mark(character: str) -> bool:
    """Whether a character is drawn onto the one before it: accents, vowel signs, skin tones."""
    return is_plain(character) and not cell_len(character)


def visible(content: bytes) -> str:
    """`content` (UTF-8, or pieces of it) as one line."""
    shown, joins = "", False
    for character in content.decode("utf-8", "surrogateescape"):
        mark = is_mark(character)
        shown += character if mark and joins else glyph(character)
        joins = (mark and joins) or (not mark and is_plain(character))
    return shown
