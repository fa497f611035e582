"""Every mistake of a command line, found before anything runs, each with the nearest valid name."""

import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, is_dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fusion.config.compose import CONFIG_FOLDER, SCHEMAS, overridable, to_settings
from fusion.config.files import missing_files
from fusion.config.origins import Origin, defaults_problem, file_problems, shown, with_origins
from fusion.config.rules import settings_problems

CHECKED_CHOICES = 64
"""Choices of one swept key that are tried."""
EXTRAS = {
    "optuna": "optuna",
    "joblib": "joblib",
    "submitit_local": "submitit",
    "submitit_slurm": "submitit",
    "ray": "ray",
}
"""Sweepers and launchers of Hydra -> the extra that brings them."""
NO_GROUP = re.compile(r"Could not override '([^']+)'. No match in the defaults list")
UNREADABLE = (yaml.YAMLError, UnicodeDecodeError)
"""What Hydra lets through of files that are no YAML, or no text."""
More = Callable[[Any], list[str]]
"""What an entry point itself finds wrong with settings. It may load libraries, so it is asked beside other mistakes
alone; a command without any meets the same check when it runs."""
EXPECTED = {"Float": "a number", "Integer": "a whole number", "Boolean": "true or false"}


@dataclass(frozen=True)
class _Checker:
    entry: str
    loader: ConfigLoaderImpl
    groups: list[str]
    more: More

    def problems(self, overrides: Sequence[Override]) -> list[str]:
        plain = not any(one.is_sweep_override() or _adds(one) or self._is_list_of_options(one) for one in overrides)
        if plain:
            whole = self._compose([str(override.input_line) for override in overrides])
            if isinstance(whole, DictConfig):
                return self._method_problems(whole)
        problems: list[str] = []
        groups = [override for override in overrides if self._is_group(override)]
        valid: list[str] = []
        for override in groups:
            found = self._group_problems(override)
            problems += found
            if not found:
                first, *others = islice(_single(override), CHECKED_CHOICES)
                valid.append(first)
                problems += [problem for choice in others for problem in self._own_file_problems(choice)]
        composed = self._compose(valid)
        base = composed if isinstance(composed, DictConfig) else None
        if isinstance(composed, str):
            found, valid, base = self._choice_problems(valid, composed)
            problems += found
        if base is None:
            return problems
        for override in overrides:
            if override not in groups and not override.key_or_group.startswith("hydra"):
                problems += self._key_problems(override, base)
        problems += self._method_problems(base)
        if problems and not any(override.is_sweep_override() for override in overrides):
            problems += self._rule_problems(base, valid, overrides)
        return problems

    def _own_file_problems(self, choice: str) -> list[str]:
        """Mistakes in a file of the user's own that a sweep chooses; ours need not be composed one by one."""
        if (CONFIG_FOLDER / f"{choice.replace('=', '/')}.yaml").is_file():
            return []
        composed = self._compose([choice])
        if isinstance(composed, str):
            return self._choice_problems([choice], composed)[0]
        return [f"{choice}: {problem}" for problem in self._method_problems(composed)]

    def _method_problems(self, config: DictConfig) -> list[str]:
        """A merge without its method, which names the job's folder and so must be there before anything else."""
        if self.entry != "merge":
            return []
        method = OmegaConf.select(config, "merge.method", default=None, throw_on_missing=False)
        if isinstance(method, str) and method:
            return []
        return [f"merge.method={method}: the name of a method is expected, in the file as `method: sce`"]

    def _choice_problems(self, choices: list[str], reason: str) -> tuple[list[str], list[str], DictConfig | None]:
        """What is wrong with files that were chosen, the choices without those, and what these compose."""
        problems, whole = [], []
        for choice in choices:
            alone = self._compose([choice])
            if isinstance(alone, DictConfig):
                whole.append(choice)
            else:
                problems += self._file_problems([choice]) or [f"{choice}: {alone}"]
        base = self._compose(whole)
        if isinstance(base, DictConfig):
            return problems or [reason], whole, base
        return problems or self._file_problems(whole) or [base], whole, None

    def _file_problems(self, choices: list[str]) -> list[str]:
        """Mistakes in YAML files, with their lines."""
        schema = overridable(SCHEMAS[self.entry])
        try:
            wrong = file_problems(self.loader, self.entry, choices, schema)
        except HydraException as error:
            return self._defaults_problems(error, choices)
        except UNREADABLE as error:
            return [_explain(error)] if isinstance(error, yaml.MarkedYAMLError) else []
        known = [*_keys(schema), *self.groups]
        return [f"{origin.text}: {self._told(origin, schema, known)}" for origin in wrong]

    def _told(self, origin: Origin, schema: DictConfig, known: list[str]) -> str:
        if OmegaConf.select(schema, origin.key, default=_MISSING, throw_on_missing=False) is _MISSING:
            return f"there is no setting `{origin.key}`;{_nearest(origin.key, known)} see --help"
        try:
            OmegaConf.update(schema, origin.key, origin.value, merge=True)
        except OmegaConfBaseException as error:
            return f"{origin.key}: {_explain(error)}"
        return f"{origin.key}: a table is expected"

    def _defaults_problems(self, error: HydraException, choices: list[str]) -> list[str]:
        found = defaults_problem(self.loader, error, choices)
        if found is None:
            return []
        place, group, option = found
        options = [one for one in self.loader.get_group_options(group) if one != "schema"]
        if group.startswith("hydra/") and option in EXTRAS:
            return [f"{place}: {group}={option} is not installed; pip install 'fusion-chat[{EXTRAS[option]}]'"]
        if not options:
            return [f"{place}: there is no group `{group}`;{_nearest(group, self.groups)} see --help"]
        if not option:
            return [f"{place}: {self.entry}.py has no group `{group}` to override; see --help"]
        return [
            f"{place}: {group}={option}: there is no such option;{_nearest(option, options)} "
            f"options are {', '.join(options)}"
        ]

    def _rule_problems(self, base: DictConfig, valid: list[str], overrides: Sequence[Override]) -> list[str]:
        """What types cannot say of those settings that are right so far, so that nothing is told only later."""
        try:
            settings = to_settings(base, SCHEMAS[self.entry])
        except OmegaConfBaseException:
            return []
        given = {override.key_or_group for override in overrides}
        found = [*settings_problems(settings), *missing_files(settings), *self.more(settings)]
        return with_origins(found, self.loader, self.entry, valid, given)

    def _is_group(self, override: Override) -> bool:
        return override.key_or_group in self.groups

    def _is_list_of_options(self, override: Override) -> bool:
        return self._is_group(override) and isinstance(override.value(), list)

    def _group_problems(self, override: Override) -> list[str]:
        group = override.key_or_group
        if self._is_list_of_options(override):
            return [f"{override.input_line}: one option is expected; -m {group}=a,b runs one job for each"]
        options = [option for option in self.loader.get_group_options(group) if option != "schema"]
        names = [single.partition("=")[2] for single in islice(_single(override), CHECKED_CHOICES)]
        return [
            f"{group}={name}: there is no such option;{_nearest(name, options)} options are {', '.join(options)}"
            for name in names
            if name not in options and name not in ("null", "")
        ]

    def _key_problems(self, override: Override, base: DictConfig) -> list[str]:
        key = override.key_or_group
        if _is_unknown(key, base, _adds(override)):
            known = [*_keys(base), *self.groups]
            return [f"{override.input_line}: there is no setting `{key}`;{_nearest(key, known)} see --help"]
        if override.is_delete():
            composed = self._compose([str(override.input_line)])
            return [f"{override.input_line}: {composed}"] if isinstance(composed, str) else []
        tried = (_set(base, choice) for choice in islice(_single(override), CHECKED_CHOICES))
        return [f"{override.input_line}: {problem}" for problem in tried if problem]

    def problems_by_option(self, overrides: Sequence[Override]) -> list[str]:
        """Settings that some options of a swept group lack; `problems` tries the first options alone."""
        groups = [override for override in overrides if self._is_group(override)]
        first = {group.key_or_group: next(_single(group)) for group in groups}
        found = []
        for group in groups:
            for choice in islice(_single(group), 1, CHECKED_CHOICES):
                composed = self._compose([*(first | {group.key_or_group: choice}).values()])
                found += [
                    f"{one.input_line}: {choice} has no setting `{one.key_or_group}`; sweep it without that option"
                    for one in overrides
                    if one not in groups
                    and isinstance(composed, DictConfig)
                    and _is_unknown(one.key_or_group, composed, _adds(one))
                ]
        return found

    def _compose(self, overrides: list[str]) -> DictConfig | str:
        """The composed config, or what is wrong with it in one sentence."""
        try:
            return compose(self.entry, overrides=overrides)
        except (HydraException, OmegaConfBaseException, *UNREADABLE) as error:
            return _explain(error)


_MISSING = object()


def command_line_problems(entry: str, arguments: Sequence[str], more: More = lambda settings: []) -> list[str]:
    """What is wrong with `arguments` for the entry `train` or `merge`; empty when they compose."""
    options, unknown = get_args_parser().parse_known_args(list(arguments))
    flags = [word for word in unknown if word.startswith("-")]
    split = [word for word in unknown if word not in flags]  # argparse reads one run of words, so Hydra does
    problems = [f"{word}: unknown option; see --help" for word in flags]
    if split and not flags:
        problems = [f"{' '.join(split)}: put options like -m before or behind all KEY=VALUE words, not between them"]
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        assert isinstance(loader, ConfigLoaderImpl)
        parser = OverridesParser.create()
        overrides = []
        for text in [*options.overrides, *split]:
            try:
                overrides.append(parser.parse_override(text))
            except HydraException as error:
                problems.append(
                    f"{text}: not KEY=VALUE ({str(error).splitlines()[0]}); "
                    "a list element with = or other signs needs quotes: targets=[\\'a=1\\',\\'a=2\\']"
                )
        _search_also(loader, options.config_dir, overrides)
        if not options.multirun:
            swept = [override for override in overrides if override.is_sweep_override()]
            overrides = [override for override in overrides if override not in swept]
            problems += [f"{one.input_line}: several values are a sweep: put -m in front" for one in swept]
            problems += [f"{one}: a search is a sweep: put -m in front" for one in _lonely_searches(entry, overrides)]
        return [*problems, *_Checker(entry, loader, loader.list_groups(""), more).problems(overrides)]


def sweep_problems(entry: str, arguments: Sequence[str]) -> list[str]:
    """Why some jobs of a sweep cannot be composed whose command line is right for its first job."""
    options, rest = get_args_parser().parse_known_args(list(arguments))
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        assert isinstance(loader, ConfigLoaderImpl)
        overrides = OverridesParser.create().parse_overrides([*options.overrides, *rest])
        _search_also(loader, options.config_dir, overrides)
        return _Checker(entry, loader, loader.list_groups(""), lambda settings: []).problems_by_option(overrides)


def _lonely_searches(entry: str, overrides: Sequence[Override]) -> list[str]:
    """Searches of which not even one job is asked for: none of the settings that they vary is given."""
    chosen = [str(one.input_line) for one in overrides if one.key_or_group == "hparams_search" and one.value()]
    if not chosen:
        return []
    try:
        varied = compose(entry, overrides=chosen, return_hydra_config=True).hydra.sweeper.get("params") or {}
    except (HydraException, OmegaConfBaseException, *UNREADABLE):  # told elsewhere
        return []
    return [] if any(one.key_or_group in varied for one in overrides) else chosen


def _search_also(loader: ConfigLoaderImpl, folder: str | None, overrides: Sequence[Override]) -> None:
    """Make the user's own config folders known to the loader, and the loader to overrides that look for files."""
    paths = [f"file://{Path(folder).absolute()}"] if folder else []
    for override in overrides:
        override.config_loader = loader
        value = override.value()
        if override.key_or_group == "hydra.searchpath" and isinstance(value, list):
            paths += map(str, value)
    for path in paths:
        loader.config_search_path.prepend("command line", path, anchor="schema")
    loader.repository.initialize_sources(loader.config_search_path)


def _adds(override: Override) -> bool:
    return override.is_add() or override.is_force_add()


def _is_unknown(key: str, base: DictConfig, adds: bool) -> bool:
    """Whether there is no setting `key` to change, or, for +KEY=VALUE, no table of free keys to add it to."""
    if not adds:
        return OmegaConf.select(base, key, default=_MISSING, throw_on_missing=False) is _MISSING
    table, _, name = key.rpartition(".")
    parent = OmegaConf.select(base, table) if table else base
    if parent is None:
        return _is_unknown(table, base, adds)
    return isinstance(parent, DictConfig) and is_dataclass(OmegaConf.get_type(parent)) and name not in parent


def _set(base: DictConfig, choice: str) -> str | None:
    """What is wrong with KEY=VALUE, tried on `base` itself: a hundred times faster than composing anew."""
    override = OverridesParser.create().parse_override(choice)
    try:
        OmegaConf.update(base, override.key_or_group, override.value(), merge=True, force_add=_adds(override))
    except OmegaConfBaseException as error:
        return _explain(error)
    return None


def _single(override: Override) -> Iterator[str]:
    """The override as plain KEY=VALUE texts: one, or one per swept choice."""
    if override.is_sweep_override():
        for choice in override.sweep_string_iterator():
            yield f"{override.get_key_element()}={choice!s}"
    else:
        yield str(override.input_line)


def _keys(config: DictConfig, prefix: str = "") -> Iterator[str]:
    for key in config:
        yield f"{prefix}{key!s}"
        child = None if OmegaConf.is_missing(config, key) else config._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none():
            yield from _keys(child, f"{prefix}{key!s}.")


def _nearest(name: str, known: Sequence[str]) -> str:
    tail = name.rpartition(".")[2]
    near = [key for key in known if key.rpartition(".")[2] == tail and key.count(".") < 2]
    near = near or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    tails = {key.rpartition(".")[2]: key for key in reversed(known)}
    near = near or [tails[tail] for tail in difflib.get_close_matches(tail, tails, n=1)]
    return f" did you mean {' or '.join(f'`{key}`' for key in near[:3])}?" if near else ""


def _explain(error: Exception) -> str:
    """The innermost reason, in words for a newcomer where we know them."""
    reason = error
    while reason.__cause__ is not None and isinstance(reason.__cause__, Exception):
        reason = reason.__cause__
    if isinstance(reason, yaml.MarkedYAMLError) and reason.problem_mark:
        mark = reason.problem_mark
        return f"{shown(Path(mark.name))}, line {mark.line + 1}: no YAML: {reason.problem}"
    if isinstance(reason, yaml.YAMLError):
        return f"no YAML: {reason}"
    if isinstance(reason, UnicodeDecodeError):
        return "the file is no text in UTF-8; save it as that"
    lines = [line for line in str(reason).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    if text.endswith("ConfigTypeError raised while composing config:"):
        return "the file holds no table; write KEY: VALUE, one per line"
    if text.endswith("is not a ListConfig, list or tuple."):
        return "a list in brackets is expected, for instance [a,b]"
    if group := NO_GROUP.search(text):
        return f"this command has no group `{group[1]}`; see --help"
    for kind, words in EXPECTED.items():
        if text.endswith(f"converted to {kind}"):
            return f"{words} is expected ({text})"
    return text
