"""Where a setting comes from: the YAML file and the line, for every key that a composed command takes from a file."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

FILE = "file://"
NO_OPTION = re.compile(r"In '(?P<config>[^']+)': Could not (?:find|load) '(?P<option>[^']+)'")
NO_OVERRIDE = re.compile(r"In '(?P<config>[^']+)': Could not override '(?P<group>[^']+)'")


@dataclass(frozen=True)
class Origin:
    """A key of a file, and what it says."""

    file: Path
    line: int
    key: str
    """From the root of the settings."""
    value: Any
    is_leaf: bool

    @property
    def text(self) -> str:
        return f"{shown(self.file)}, line {self.line}"


def shown(file: Path) -> str:
    """Relative to the working directory, where it lies below it."""
    return str(file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file)


def origins(loader: ConfigLoaderImpl, entry: str, overrides: Sequence[str]) -> list[Origin]:
    """All keys of all files that this command is composed of, in the order in which later ones win.

    Raises:
        HydraException: a file names groups or options that do not exist.
    """
    chosen = loader.compute_defaults_list(entry, list(overrides), RunMode.RUN)
    found: list[Origin] = []
    for default in chosen.defaults:
        loaded = loader.repository.load_config(default.config_path or "")
        if loaded is not None and loaded.path.startswith(FILE) and default.config_path:
            file = Path(loaded.path.removeprefix(FILE)) / f"{default.config_path}.yaml"
            found += _keys_of(file, default.package or "")
    return [origin for origin in found if not origin.key.startswith("hydra.") and origin.key != "hydra"]


def _keys_of(file: Path, package: str) -> Iterator[Origin]:
    try:
        node = yaml.compose(file.read_text("utf-8"), Loader=yaml.SafeLoader)
        content = OmegaConf.to_container(OmegaConf.load(file))
    except (OSError, yaml.YAMLError, OmegaConfBaseException):
        return
    if isinstance(node, yaml.MappingNode) and isinstance(content, Mapping):
        yield from _walk(file, node, content, package.removeprefix("_global_"), is_top=True)


def _walk(
    file: Path, node: yaml.MappingNode, content: Mapping[Any, Any], prefix: str, is_top: bool = False
) -> Iterator[Origin]:
    for (name, below), value in zip(node.value, content.values(), strict=False):
        if is_top and name.value == "defaults":
            continue
        key = f"{prefix}.{name.value}" if prefix else str(name.value)
        is_table = isinstance(below, yaml.MappingNode) and isinstance(value, Mapping)
        yield Origin(file, name.start_mark.line + 1, key, value, not is_table)
        if is_table:
            yield from _walk(file, below, value, key)


def with_origins(
    problems: Sequence[str], loader: ConfigLoaderImpl, entry: str, overrides: Sequence[str], given: Collection[str]
) -> list[str]:
    """`problems` that begin with the key of a setting get the file and line that set it, but for keys in `given`.

    `overrides` must compose; `given` are the keys that the command line itself sets.
    """
    try:
        places = {origin.key: origin.text for origin in origins(loader, entry, overrides) if origin.is_leaf}
    except HydraException:
        return list(problems)
    told = []
    for problem in problems:
        key = re.split(r"[=: ]", problem, maxsplit=1)[0]
        place = None if key in given else places.get(key)
        told.append(f"{problem} ({place})" if place else problem)
    return told


def defaults_problem(
    loader: ConfigLoaderImpl, error: HydraException, choices: Sequence[str]
) -> tuple[str, str, str] | None:
    """File and line, group and option that a defaults list names in vain; None when the error is another one.

    Hydra names the file that has the group; the one that asks for the option may be any of `choices` (GROUP=OPTION).
    """
    text = str(error)
    missing, override = NO_OPTION.search(text), NO_OVERRIDE.search(text)
    if missing is None and override is None:
        return None
    if missing is not None:
        group, _, option = missing["option"].rpartition("/")
        config, word = missing["config"], option
    else:
        assert override is not None
        group, option = override["group"].partition("@")[0], ""
        config, word = override["config"], group
    for name in [*(choice.replace("=", "/") for choice in choices), config]:
        place = _place_of(loader, name, word)
        if place:
            return place, group, option
    return config, group, option


def _place_of(loader: ConfigLoaderImpl, config: str, word: str) -> str | None:
    """Where a config says `word`."""
    loaded = loader.repository.load_config(config)
    if loaded is None or not loaded.path.startswith(FILE):
        return None
    file = Path(loaded.path.removeprefix(FILE)) / f"{config}.yaml"
    for number, line in enumerate(file.read_text("utf-8").splitlines(), 1):
        if not line.startswith("#") and re.search(rf"\b{re.escape(word)}\b", line):
            return f"{shown(file)}, line {number}"
    return None


def file_problems(loader: ConfigLoaderImpl, entry: str, overrides: Sequence[str], schema: DictConfig) -> list[Origin]:
    """Keys of files that the schema does not have, or whose values have the wrong type."""
    wrong: list[Origin] = []
    for origin in origins(loader, entry, overrides):
        if any(origin.key.startswith(f"{one.key}.") for one in wrong):
            continue
        unknown = OmegaConf.select(schema, origin.key, default=_MISSING, throw_on_missing=False) is _MISSING
        if unknown and not _is_free(schema, origin.key):
            wrong.append(origin)
        elif origin.is_leaf:
            try:
                OmegaConf.update(schema, origin.key, origin.value, merge=True, force_add=unknown)
            except OmegaConfBaseException:
                wrong.append(origin)
    return wrong


_MISSING = object()


def _is_free(schema: DictConfig, key: str) -> bool:
    """Whether a table above `key` takes any key."""
    while "." in key:
        key = key.rpartition(".")[0]
        node = OmegaConf.select(schema, key, default=None)
        if isinstance(node, DictConfig):
            return OmegaConf.get_type(node) is dict
    return False
