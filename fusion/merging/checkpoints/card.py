"""The card of a merged model: what it is made of and how, coefficients, scores, and the command that makes it again.

It holds nothing that differs between two attempts at the same merge. The manifest does not list it: scores come later,
and people write on.
"""

import inspect
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fusion.cache import write_text
from fusion.merging.checkpoints.manifest import MANIFEST_FILE, versions
from fusion.merging.layers import layer_of
from fusion.merging.method import MergeMethod, load_method
from fusion.merging.report import MergeReport

CARD_FILE = "README.md"
SNAPSHOT = re.compile(r"models--(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+)/snapshots/")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
NO_NAME = re.compile(r"[^\w.-]+")


@dataclass(frozen=True)
class Ancestor:
    """A model that went in: a folder or hub id, by the name that tables use, and what it was made from, if known."""

    name: str
    path: str
    made_from: str = ""

    @property
    def hub_id(self) -> str:
        """OWNER/NAME for models of the hub; a name that the hub accepts for others."""
        snapshot = SNAPSHOT.search(self.path)
        if snapshot:
            return f"{snapshot['owner']}/{snapshot['name']}"
        is_id = HUB_ID.fullmatch(self.path) and not Path(self.path).exists()
        return self.path if is_id else NO_NAME.sub("-", self.name).strip("-.")


@dataclass(frozen=True)
class Provenance:
    """Where a merged model comes from, as who made it knows it."""

    base: Ancestor | None
    targets: Sequence[Ancestor]
    command: str
    scores: Sequence[tuple[str, Mapping[str, float | None]]] = field(default_factory=list)
    """Models, the merged one among them, with their scores by name."""

    @classmethod
    def of_call(cls, report: MergeReport, base: Path | None, targets: Sequence[Path], vocabulary: str) -> "Provenance":
        """Of a call of `merge_folders`."""
        settings: dict[str, object] = {"scale": report.scale, "seed": report.seed, "vocabulary": vocabulary}
        settings |= {name: as_given(value) for name, value in report.parameters.items()}
        inputs = [repr(report.method), repr(base and str(base)), repr([str(target) for target in targets]), "'OUT'"]
        arguments = ", ".join([*inputs, *(f"{name}={value!r}" for name, value in settings.items())])
        command = f'python -c "from fusion.merging import merge_folders; merge_folders({arguments})"'
        ancestors = [Ancestor(target.name, str(target)) for target in targets]
        return cls(Ancestor(base.name, str(base)) if base else None, ancestors, command)


def merge_card(report: MergeReport, method: MergeMethod[...], origin: Provenance) -> str:
    """The card as Markdown, with the metadata of https://huggingface.co/docs/hub/model-cards in front."""
    parts = [
        _front_matter(origin),
        f"# {method.name} of {len(origin.targets)} models",
        "Merged in parameter space with Fusion.",
        _models(origin),
        _formula(report, method, origin),
        _table("Parameters", ["parameter", "value"], _parameters(report)),
        _coefficients(report, origin),
        _scores(origin),
        f"## Make it again\n\n```sh\n{origin.command}\n```",
        f"Made with {', '.join(f'{name} {number}' for name, number in versions().items())}. `{MANIFEST_FILE}` has the "
        "SHA-256 of what went in and came out; `python -m fusion.merging.verify FOLDER` compares.",
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def write_card(model: Path, report: MergeReport, origin: Provenance) -> None:
    """Write the card of a merged model, or write it anew, such as with its scores."""
    write_text(model / CARD_FILE, merge_card(report, load_method(report.method), origin))


def as_given(value: object) -> object:
    """A parameter as the user writes it: a report keeps patterns as pairs."""
    if isinstance(value, Mapping) and set(value) == {"patterns"}:
        return {pattern: as_given(one) for pattern, one in value["patterns"]}
    return value


def _front_matter(origin: Provenance) -> str:
    models = dict.fromkeys(one.hub_id for one in [*([origin.base] if origin.base else []), *origin.targets])
    lines = ["library_name: transformers", "tags: [merge, fusion]", f"base_model: {json.dumps(list(models))}"]
    return "\n".join(["---", *lines, "base_model_relation: merge", "---"])


def _models(origin: Provenance) -> str:
    rows = [("base", origin.base)] if origin.base else []
    rows += [("target", target) for target in origin.targets]
    cells = [[role, one.name, f"`{one.path}`", one.made_from] for role, one in rows]
    columns = ["role", "model", "where", "made from"]
    has_sources = any(one.made_from for _, one in rows)
    return _table(
        "Models", columns if has_sources else columns[:-1], cells if has_sources else [c[:-1] for c in cells]
    )


def _formula(report: MergeReport, method: MergeMethod[...], origin: Provenance) -> str:
    what = inspect.getdoc(method.function) or ""
    if origin.base is None:
        made = "merged = the merged weights, where d_j = the weights of target j"
    elif method.operands == "weights":
        made = f"merged = base + {report.scale:g} * (the merged weights - base), where d_j = the weights of target j"
    else:
        made = f"merged = base + {report.scale:g} * the merged delta, where d_j = target j - base"
    return f"## Formula\n\n`{made}`\n\n{what}\n\nPaper: <{method.paper}>"


def _parameters(report: MergeReport) -> list[list[str]]:
    settings = {"scale": report.scale, "seed": report.seed, **report.parameters}
    return [[name, f"`{json.dumps(as_given(value), ensure_ascii=False)}`"] for name, value in settings.items()]


def _coefficients(report: MergeReport, origin: Provenance) -> str:
    names = [target.name for target in origin.targets]
    rows = [["all", *map(_number, report.mean_coefficients)], ["norm of the delta", *map(_number, report.delta_norms)]]
    means = _table("Coefficients", ["mean over elements", *names], rows)
    layers = [[f"`{layer}`", *map(_number, values)] for layer, values in _by_layer(report).items()]
    events = [f"- {event}: {len(tensors)} tensors" for event, tensors in report.events.items()]
    return "\n\n".join([means, _table("", ["layer", *names], layers), *(["\n".join(events)] if events else [])])


def _by_layer(report: MergeReport) -> dict[str, list[float]]:
    """The mean coefficients of each layer, over its elements."""
    sums: dict[str, list[float]] = {}
    sizes: dict[str, int] = {}
    for name, coefficients in report.coefficients.items():
        layer, size = layer_of(name), int(str(report.tensors[name]["elements"]))
        sizes[layer] = sizes.get(layer, 0) + size
        before = sums.get(layer, [0.0] * len(coefficients))
        sums[layer] = [total + size * one for total, one in zip(before, coefficients, strict=True)]
    return {layer: [total / sizes[layer] for total in totals] for layer, totals in sums.items()}


def _scores(origin: Provenance) -> str:
    names = list(dict.fromkeys(name for _, scores in origin.scores for name in scores))
    rows = [[model, *(_number(scores.get(name)) for name in names)] for model, scores in origin.scores]
    return _table("Scores", ["model", *names], rows) if rows else ""


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    cells = [columns, ["---"] * len(columns), *rows]
    lines = [f"| {' | '.join(one.replace('|', '/') for one in row)} |" for row in cells]
    return "\n".join([*([f"## {title}", ""] if title else []), *lines])
