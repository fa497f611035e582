"""Numbers as people read them."""

GIB = 1 << 30


def size_text(num_bytes: float) -> str:
    """Bytes in the largest unit that leaves a digit before the point."""
    for unit, name in ((1 << 40, "TiB"), (GIB, "GiB"), (1 << 20, "MiB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.1f} {name}"
    return f"{num_bytes / 1024:.0f} KiB"


def count_text(number: float) -> str:
    """A count with its thousands, millions or billions."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return f"{number:.0f}"


def hours_text(hours: float) -> str:
    """Hours, or minutes when they are few."""
    return f"{hours:,.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"


def table(title: str, lines: list[tuple[str, str]]) -> str:
    """A heading with indented lines of two columns."""
    width = max(len(name) for name, _ in lines)
    return "\n".join([title, *(f"  {name.ljust(width)}  {value}" for name, value in lines)])


def verdict(problems: list[str]) -> str:
    """The last lines of a plan."""
    if not problems:
        return "it fits; nothing was run"
    return "\n".join(["it does not fit; nothing was run", *(f"  - {problem}" for problem in problems)])
