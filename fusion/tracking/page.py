"""Pages that need no network: templates, filled in."""

import json
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fusion.tracking.summary import count_text, decimal_text, percent

HERE = Path(__file__).parent


def render(template: str, folder: Path = HERE, **values: object) -> str:
    """The template of that folder with the values in it; text is escaped, and a missing value is an error."""
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"percent": percent, "count": count_text, "decimal": decimal_text, "json": _compact}
    return environment.get_template(template).render(**values)


def _compact(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
