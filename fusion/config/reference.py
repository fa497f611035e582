"""The reference of all settings: `python -m fusion.config.reference > docs/settings.md`."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

from fusion.config.compose import CONFIG_FOLDER, SCHEMAS
from fusion.config.help import ABOUT, field_sentences
from fusion.config.rules import ABOVE_ZERO, AT_LEAST, CHOICES, SHARES

HEAD = """# All settings

Change one with `KEY=VALUE`, sweep it with `-m KEY=A,B,C`, choose a file of a group with `GROUP=OPTION`. The defaults
in these tables are those of the types; the files that a command composes may say otherwise, and `--cfg job` shows what
it gets. `python -m fusion.config.reference > docs/settings.md` writes this page anew."""

OTHER_GROUPS = ("launcher", "hparams_search")
"""Groups of files that set Hydra's own settings."""


def reference() -> str:
    """The whole page in Markdown."""
    parts = [HEAD]
    for entry, schema in SCHEMAS.items():
        parts += [f"## {entry}.py", ABOUT[entry][0].upper() + ABOUT[entry][1:] + ".", _table(schema, "", nested=False)]
        for field in fields(schema):
            nested = get_type_hints(schema)[field.name]
            if is_dataclass(nested):
                parts += [f"### {field.name}", _options(field.name), _table(nested, f"{field.name}.", nested=True)]
        for group in OTHER_GROUPS:
            parts += [f"### {group}", _options(group, entry)]
        if entry == "merge":
            parts += ["### merge", _options("merge"), "The parameters of a method are in its file."]
    return "\n\n".join(part for part in parts if part) + "\n"


def _options(group: str, entry: str = "") -> str:
    """The files of a group, each with the comment that it begins with; only those of `entry` where they name one."""
    lines = []
    for path in sorted((CONFIG_FOLDER / group).glob("*.yaml")):
        comments = [line for line in path.read_text("utf-8").splitlines() if line.startswith("# ")]
        about = next((line.removeprefix("# ") for line in comments if not line.startswith("# @package")), "")
        if not any(about.startswith(f"{other}.py") for other in SCHEMAS if other != (entry or other)):
            lines.append(f"- `{group}={path.stem}`: {about}".rstrip())
    return "\n".join(lines)


def _table(schema: Any, prefix: str, nested: bool) -> str:
    rows = list(_rows(schema, prefix, nested))
    return "\n".join(["| setting | default | |", "|---|---|---|", *rows]) if rows else ""


def _rows(schema: Any, prefix: str, nested: bool) -> Iterator[str]:
    sentences, types, defaults = field_sentences(schema), get_type_hints(schema), schema()
    for field in fields(schema):
        key, value = f"{prefix}{field.name}", getattr(defaults, field.name)
        if is_dataclass(types[field.name]):
            if nested:
                yield from _rows(types[field.name], f"{key}.", nested)
        elif field.name in sentences:
            told = f"{sentences[field.name]} {_limits(key)}".strip()
            yield f"| `{key}` | {_default(value)} | {_cell(told)} |"


def _limits(key: str) -> str:
    if key in CHOICES:
        return f"One of {', '.join(CHOICES[key])}."
    if key in SHARES:
        return "From 0 to 1."
    if key in AT_LEAST:
        return f"At least {AT_LEAST[key]:g}."
    return "Above 0." if key in ABOVE_ZERO else ""


def _default(value: Any) -> str:
    if is_dataclass(value) or (isinstance(value, dict) and any(map(is_dataclass, value.values()))):
        return "see conf/"
    if value in ("", None):
        return "empty" if value == "" else "`null`"
    return f"`{_cell(str(value).lower() if isinstance(value, bool) else str(value))}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    print(reference(), end="")
