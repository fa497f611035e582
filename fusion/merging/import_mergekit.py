"""`python -m fusion.merging.import_mergekit FILE.yml`: a merge that is described for mergekit, described for merge.py.

It prints the command line, and every difference in what the two compute; --out writes the settings as a study.
"""

import argparse
import json
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fusion.config import EXIT_USER_ERROR, UserError, raise_problems
from fusion.merging.mergekit.rules import RULES, Parameter, Rule
from fusion.merging.mergekit.values import cases_of, combined
from fusion.merging.varying import is_gradient

REFUSED = {
    "slices": "layers of several models in another order are not built; one slice with all layers of its models says "
    "the same as `models:`, so write it that way",
    "modules": "models of several modules are not built: give `models:`",
    "chat_template": "the merged model keeps the base's template: take the line out, and change it afterwards",
}
DTYPES = ("dtype", "out_dtype")
KNOWN = {"merge_method", "models", "base_model", "parameters", "tokenizer_source", "tokenizer", *REFUSED, *DTYPES}
IGNORED = {
    "int8_mask": "saves memory in mergekit, and is not needed here",
    "eps": "directions without length have rules of their own here",
}
HEAD = "over the layers (gradient): the final norm and the head get the last anchor; mergekit gives them the first"
BY_NUMBER = "tokenizer_source: this merge has no base here, and embeddings are merged row by row: tokens must agree"
NEW_IDS = "tokenizer_source: tokens that the base lacks may get other ids here than mergekit gives them"
UNION = "union"
PLAIN = re.compile(r"[\w./-]+")


@dataclass
class Imported:
    """A configuration in our terms; with problems it must not be used."""

    method: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)
    targets: list[str] = field(default_factory=list)
    base: str | None = None
    vocabulary: str | None = None
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def _inputs(self) -> dict[str, Any]:
        given = {"targets": self.targets, "base": self.base, "vocabulary": self.vocabulary}
        return {name: value for name, value in given.items() if value}

    @property
    def overrides(self) -> list[str]:
        """The arguments of merge.py."""
        settings = self._inputs | {f"merge.{name}": value for name, value in self.parameters.items()}
        return [f"merge={self.method}", *(f"{name}={_written(value)}" for name, value in settings.items())]

    @property
    def study(self) -> str:
        """The same as a file for `experiments/`."""
        settings: dict[str, Any] = {"defaults": [{"override /merge": self.method}], **self._inputs}
        settings |= {"merge": self.parameters} if self.parameters else {}
        lines = ["# @package _global_", "# merge.py: imported from a configuration of mergekit."]
        text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
        return "\n".join([*lines, *(f"# {note}" for note in self.notes), text])


def read_config(path: Path) -> Imported:
    """The merge that the YAML file `path` describes.

    Raises:
        UserError: with everything in it that cannot be done here.
    """
    try:
        config = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read as YAML ({error})") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: must hold a mapping with `merge_method` and `models`")
    imported = import_config(config)
    raise_problems([f"{path}: {problem}" for problem in imported.problems])
    return imported


def import_config(config: Mapping[str, Any]) -> Imported:
    """`config`, what a file of mergekit holds, in our terms."""
    imported = Imported()
    imported.problems += [f"{key}: {REFUSED[key]}" for key in REFUSED if config.get(key)]
    imported.problems += _tokenizer_problems(config)
    imported.notes += [f"{key}: mergekit knows no such key, and it is ignored" for key in config if key not in KNOWN]
    if any(config.get(key) for key in DTYPES):
        imported.notes.append("dtype: everything is computed in float32, and saved in the inputs' dtype")
    rule = RULES.get(str(config.get("merge_method")))
    if rule is None:
        imported.problems.append(f"merge_method: '{config.get('merge_method')}' is not one of {', '.join(RULES)}")
    models = _models(config, imported) if "slices" not in config and "modules" not in config else []
    if rule and models:
        _fill(imported, rule, models, config)
    return imported


def _models(config: Mapping[str, Any], imported: Imported) -> list[tuple[str, Mapping[str, Any]]]:
    """Every model with its parameters."""
    listed = config.get("models")
    if not isinstance(listed, list) or not all(isinstance(one, dict) and "model" in one for one in listed):
        imported.problems.append("models: must list mappings with `model`, and `parameters` where there are any")
        return []
    base = config.get("base_model")
    models = []
    for one in [*listed, *([{"model": base}] if base else [])]:
        model = one["model"]
        if not isinstance(model, str):
            imported.problems.append(f"model {model!r}: must be the path of a folder")
            continue
        under, _, adapter = model.partition("+")
        if adapter and (model == base or under != base):
            imported.problems.append(
                f"model {model}: an adapter of another model than the base: merge it into it first"
            )
        path = adapter or under
        if not Path(path).is_dir():
            imported.notes.append(f"{path} is no folder here: fetch it, and give its folder")
        models.append((path, one.get("parameters") or {}))
    imported.notes = list(dict.fromkeys(imported.notes))
    return models[: len(listed)]


def _fill(
    imported: Imported, rule: Rule, models: list[tuple[str, Mapping[str, Any]]], config: Mapping[str, Any]
) -> None:
    from fusion.merging import check_parameters, load_method

    base, problems = config.get("base_model"), imported.problems
    if rule.base == "required" and not base:
        problems.append(f"base_model: is missing, and {config['merge_method']} needs one")
    if base and all(name != base for name, _ in models):
        models = [*models, (str(base), {})]  # as mergekit does
    others = [model for model in models if model[0] != base]
    if rule.targets == "first":
        targets = [model for model in models if model[0] == base] + others
    else:
        targets = models if rule.targets == "all" else others
    imported.method, imported.targets = rule.ours, [name for name, _ in targets]
    imported.base = str(base) if base and rule.targets == "others" else None
    source = _tokenizer_source(config)
    if source == UNION:
        imported.vocabulary = UNION
        imported.notes.append(NEW_IDS)
    elif source:
        imported.vocabulary = "base" if imported.base else None
        imported.notes += [] if imported.base else [BY_NUMBER]
    shared = config.get("parameters") or {}
    imported.notes += rule.notes + tuple(_unread(rule, shared, [parameters for _, parameters in models]))
    scopes = {"each": others, "all": models}
    for name, parameter in rule.parameters.items():
        own = [one for _, one in scopes.get(parameter.scope, [("", {})])]
        try:
            value = _value(name, parameter, own, shared)
        except UserError as error:
            problems += [f"{name}: {problem}" for problem in error.problems]
            continue
        if parameter.ours:
            imported.parameters[parameter.ours] = value
    imported.parameters |= rule.fixed
    if any(map(_has_gradient, imported.parameters.values())):
        imported.notes.append(HEAD)
    count = load_method(rule.ours).num_targets
    if count not in (None, len(targets)):
        problems.append(f"models: {config['merge_method']} takes {count} targets, got {len(targets)}")
    if not problems:
        ours = {name: value for name, value in imported.parameters.items() if name != "scale"}
        problems += check_parameters(rule.ours, ours, num_targets=len(targets))


def _value(name: str, parameter: Parameter, own: Sequence[Mapping[str, Any]], shared: Mapping[str, Any]) -> Any:
    """A parameter's value of ours: of the models with their `own` parameters, or of all together."""
    if parameter.ours is None and parameter.words is None:
        return None
    said = [[given[name] for given in (one, shared) if given.get(name) is not None] for one in own]
    value = combined([cases_of([*settings, parameter.default]) for settings in said])
    if isinstance(value, Mapping) and (parameter.words or not parameter.varies):
        raise UserError("varies over layers or tensors in mergekit: here it is one for the model")
    if parameter.words is None:
        return value
    if isinstance(value, list) or value not in parameter.words:
        allowed = " or ".join(str(word).lower() for word in parameter.words if word is not None)
        raise UserError(f"{str(value).lower()} is not built here: only {allowed}")
    return parameter.words[value]


def _unread(rule: Rule, shared: Mapping[str, Any], own: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Parameters of the file that change nothing."""
    for name in dict.fromkeys([*shared, *(name for one in own for name in one)]):
        parameter = rule.parameters.get(name)
        if name in IGNORED:
            yield f"{name}: {IGNORED[name]}"
        elif parameter is None:
            yield f"{name}: no parameter of this method in mergekit, and it is ignored"
        elif parameter.scope == "model" and any(name in one for one in own):
            yield f"{name}: mergekit reads it from the `parameters` of the whole merge alone; a model's is ignored"


def _tokenizer_problems(config: Mapping[str, Any]) -> list[str]:
    source, tokenizer = _tokenizer_source(config), config.get("tokenizer")
    problems = []
    if source not in (None, "base", UNION, config.get("base_model")):
        problems.append(f"tokenizer_source: '{source}' is not built: leave it out, or give `base` or `union`")
    if tokenizer and (not isinstance(tokenizer, Mapping) or set(tokenizer) != {"source"}):
        problems.append("tokenizer: embeddings of single tokens and padding are not built: give `source` alone")
    return problems


def _tokenizer_source(config: Mapping[str, Any]) -> Any:
    """Whose tokens the merged model gets; None: nothing is said, and rows are merged by their numbers."""
    tokenizer = config.get("tokenizer")
    return config.get("tokenizer_source") or (tokenizer.get("source") if isinstance(tokenizer, Mapping) else None)


def _has_gradient(value: object) -> bool:
    return isinstance(value, Mapping) and (is_gradient(value) or any(map(_has_gradient, value.values())))


def _written(value: Any) -> str:
    """A value in the grammar of command lines (https://hydra.cc/docs/advanced/override_grammar/basic/)."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_written(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_written, value)) + "]"
    if isinstance(value, str) and not PLAIN.fullmatch(value):
        return json.dumps(value, ensure_ascii=False)
    return str(value).lower() if isinstance(value, bool) else str(value)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the command line and the differences; exit code 0, or 2 for what cannot be done here."""
    parser = argparse.ArgumentParser(prog="python -m fusion.merging.import_mergekit", description=__doc__)
    parser.add_argument("config", type=Path, metavar="FILE.yml", help="a configuration of mergekit")
    parser.add_argument("--out", type=Path, metavar="FILE.yaml", help="write a study, e.g. experiments/NAME.yaml")
    options = parser.parse_args(arguments)
    try:
        imported = read_config(options.config)
    except UserError as error:
        print("\n".join(error.problems), file=sys.stderr)
        return EXIT_USER_ERROR
    print(
        shlex.join(["python", "merge.py", *imported.overrides]),
        *(f"note: {note}" for note in imported.notes),
        sep="\n",
    )
    if options.out:
        options.out.write_text(imported.study, "utf-8")
        print(f"written: {options.out}; in experiments/ it runs by `python merge.py experiments={options.out.stem}`")
    return 0


if __name__ == "__main__":
    sys.exit(main())
