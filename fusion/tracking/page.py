"""Pages that need no network: templates of this folder, filled in."""

import json
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fusion.tracking.summary import count_text, decimal_text, percent


def render(template: str, **values: object) -> str:
    """The template with the values in it; text is escaped, and a value that is missing is an error."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
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
