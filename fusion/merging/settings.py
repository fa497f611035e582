"""What the settings of a job ask for: a method, its parameters, and a scale that may have to be searched."""

import math
from typing import Any, NamedTuple

from fusion.config import UserError, raise_problems
from fusion.config.schema import MergeConfig
from fusion.merging.parameters import check_parameters

SEARCH = "search"


class Asked(NamedTuple):
    method: str
    parameters: dict[str, Any]
    scale: float | None
    """None: it is searched."""


def asked(config: MergeConfig, num_targets: int | None) -> Asked:
    """What is asked for, of so many targets if that is known.

    Raises:
        UserError: with every mistake in it.
    """
    parameters = {name: value for name, value in config.merge.items() if name not in ("method", "scale")}
    method, scale = str(config.merge["method"]), config.merge.get("scale", 1.0)
    problems = check_parameters(method, parameters, num_targets=num_targets)
    if scale != SEARCH and not _is_number(scale):
        problems.append(f"merge.scale={scale}: a number is expected, or {SEARCH}")
    raise_problems(problems)
    return Asked(method, parameters, None if scale == SEARCH else float(scale))


def asked_problems(config: MergeConfig) -> list[str]:
    """What is wrong with it, as far as it can be said without the targets."""
    try:
        asked(config, None)
    except UserError as error:
        return error.problems
    return []


def _is_number(scale: object) -> bool:
    return isinstance(scale, int | float) and not isinstance(scale, bool) and math.isfinite(scale)
