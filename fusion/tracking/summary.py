"""What a comparison says: every model over its seeds, in the order of the report, and the sentences about them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from fusion.tracking.rows import AVERAGE, ComparisonRow, Kind
from fusion.tracking.statistics import Estimate, estimate, overlap

Verdict = Literal["", "best", "tied"]
MISSING = "-"
_COMPETING: tuple[Kind, Kind] = ("merged", "target")


@dataclass(frozen=True)
class ModelSummary:
    """One line of the comparison: a model over its seeds."""

    label: str
    kind: Kind
    rows: tuple[ComparisonRow, ...]  # by seed; the values of every estimate are those of the distinct ones
    settings: Mapping[str, Any]  # flat: "optim.lr" -> 0.001
    scores: Mapping[str, Estimate]  # every skill of the comparison, and "average"
    nll_per_byte: Estimate
    verdict: Verdict = ""
    reports: tuple[Mapping[str, Any], ...] = ()  # targets: of alignment and fusion, one per measurement

    @property
    def average(self) -> Estimate:
        return self.scores[AVERAGE]

    @property
    def strong_skills(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(skill for row in self.rows for skill in row.strong_skills))

    @property
    def scale(self) -> Estimate:
        return estimate([row.scale for row in self.rows])

    @cached_property
    def coefficients(self) -> dict[str, float]:
        """Mean coefficient over tensors and seeds, by target."""
        targets = sorted({target for row in self.rows for target in row.coefficients})
        means = {target: estimate([row.coefficients.get(target) for row in self.rows]).mean for target in targets}
        return {target: mean for target, mean in means.items() if mean is not None}

    @property
    def scale_text(self) -> str:
        """The scale in words, such as "scale 1.7 to 1.9, searched"; "" where there is none."""
        scales = sorted({f"{row.scale:.3g}" for row in self.rows if row.scale is not None}, key=float)
        ends = " to ".join(dict.fromkeys((scales[0], scales[-1]))) if scales else ""
        searched = "searched" if any(row.scale_searched for row in self.rows) else ""
        return ", ".join(part for part in (ends and f"scale {ends}", searched) if part)


@dataclass(frozen=True)
class Comparison:
    """All models in the order of the report: pivot, sources, SFT, targets, merged by falling average."""

    skills: tuple[str, ...]
    models: tuple[ModelSummary, ...]

    def of_kind(self, kind: Kind) -> list[ModelSummary]:
        return [model for model in self.models if model.kind == kind]

    def best(self, kind: Kind) -> ModelSummary | None:
        """The model of `kind` with the highest average, if one has an average."""
        return next(iter(sorted((m for m in self.of_kind(kind) if m.average.mean is not None), key=rank)), None)

    @property
    def targets(self) -> list[str]:
        """Names of the merged targets."""
        return sorted({target for model in self.of_kind("merged") for target in model.coefficients})

    @cached_property
    def contest(self) -> list[ModelSummary]:
        """The models that compete: the merges, or the targets where there are not two merges; by falling average."""
        merged, targets = ([m for m in self.of_kind(kind) if m.average.mean is not None] for kind in _COMPETING)
        return sorted(merged if len(merged) > 1 else targets, key=rank)

    @cached_property
    def standouts(self) -> dict[str, ModelSummary]:
        """Skill (or "average") -> the competing model whose 95% interval lies above those of all others."""
        found = {skill: _standout(self.contest, skill) for skill in (AVERAGE, *self.skills)}
        return {skill: model for skill, model in found.items() if model}

    def strong_sources(self, skill: str) -> list[str]:
        return [model.label for model in self.of_kind("source") if skill in model.strong_skills]

    @property
    def headline(self) -> str:
        """One line: the best merge, the best target, SFT and the pivot, in percent."""
        names: dict[Kind, str] = {"merged": "best merged", "target": "best target", "sft": "SFT", "pivot": "pivot"}
        found = ((name, self.best(kind)) for kind, name in names.items())
        return " | ".join(_headline_part(name, model) for name, model in found if model)

    @property
    def paired_difference(self) -> str:
        """The two leading merges compared seed by seed, which is sharper than two intervals; "" without such seeds."""
        leaders = [model for model in self.of_kind("merged") if model.average.mean is not None][:2]
        by_seed = [{row.seed: row.scores.get(AVERAGE) for row in model.rows} for model in leaders]
        if len(leaders) < 2:
            return ""
        pairs = [(score, by_seed[1].get(seed)) for seed, score in by_seed[0].items()]
        gap = estimate([first - second for first, second in pairs if first is not None and second is not None])
        if gap.mean is None or not gap.sd or gap.interval is None:  # seeds that all agree say nothing about noise
            return ""
        low, high = (f"{100 * end:+.1f}" for end in gap.interval)
        names = f"{leaders[0].label} against {leaders[1].label}"
        return f"{names}, paired over {len(gap.values)} seeds: {100 * gap.mean:+.1f} points (95% {low} to {high})"


def _standout(models: Sequence[ModelSummary], skill: str) -> ModelSummary | None:
    scored = [model for model in models if model.scores[skill].mean is not None]
    if len(scored) < 2:
        return None
    first, *others = sorted(scored, key=lambda model: -(model.scores[skill].mean or 0.0))
    return None if any(overlap(first.scores[skill], other.scores[skill]) for other in others) else first


def rank(model: ModelSummary) -> tuple[float, str]:
    """Sorting key: falling average, models without one last, then by name."""
    return (-model.average.mean if model.average.mean is not None else 1.0, model.label)


def setting_name(key: str) -> str:
    """`alignment` for `targets.alignment.name`: as the option is written on the command line."""
    return key.removeprefix("targets.").removesuffix(".name")


def percent(value: float | None) -> str:
    return MISSING if value is None else f"{100 * value:.1f}"


def count_text(value: float | None) -> str:
    """A whole number; of means over seeds the first decimal."""
    return MISSING if value is None else f"{value:.1f}".removesuffix(".0")


def decimal_text(value: float | None) -> str:
    return MISSING if value is None else f"{value:.1f}"


def share_text(score: Estimate) -> str:
    """Percent with its spread: "64.9 ± 3.7" over seeds, "64.9 [61.3, 68.5]" by items."""
    if score.mean is None:
        return MISSING
    if score.sd is not None:
        return f"{percent(score.mean)} ± {percent(score.sd)}"
    return percent(score.mean) + (f" [{', '.join(map(percent, score.interval))}]" if score.interval else "")


def number_text(number: Estimate) -> str:
    if number.mean is None:
        return MISSING
    return f"{number.mean:.3f}" + (f" ± {number.sd:.3f}" if number.sd is not None else "")


def _headline_part(name: str, model: ModelSummary) -> str:
    score = percent(model.average.mean)
    if model.kind != "merged":
        return f"{name} {score}"
    tied = " (tied)" if model.verdict == "tied" else ""
    spread = f" ± {percent(model.average.sd)}" if model.average.sd is not None else ""
    scale = f" ({model.scale_text})" if model.scale_text else ""
    return f"{name}{tied}: {model.label} {score}{spread}{scale}"
