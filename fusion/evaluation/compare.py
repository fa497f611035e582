"""Several models on the same dialogues: one comparison row each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fusion.config.schema import DataConfig, EvaluationConfig, ModelConfig, PathsConfig
from fusion.dialogues.dialogue import Dialogue
from fusion.dialogues.load import load_dialogues, load_splits
from fusion.dialogues.reader import scoring_reader, with_tokenizer
from fusion.evaluation.samples import choose_samples
from fusion.evaluation.score import Scores, score_folder, score_weights
from fusion.tracking.inputs import MergeInputs, read_lineage
from fusion.tracking.rows import ComparisonRow, Kind
from fusion.tracking.stage1 import TargetRun


@dataclass(frozen=True)
class ScoredModel:
    """A model to score; `strong_skills` are those its source is strong in."""

    kind: Kind
    model: ModelConfig
    strong_skills: tuple[str, ...] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """Of targets and SFT: the settings by which they were trained."""
    alignment: Mapping[str, Any] = field(default_factory=dict)
    """Of targets: stage 1's report of alignment and fusion."""
    weights: Mapping[str, Tensor] | None = None
    """What is scored in place of the weights in the model's folder."""
    tokenizer: Path | None = None
    """Folder of the tokeniser that fits `weights`; None: it is the model's own."""


def models_of_merge(inputs: MergeInputs) -> list[ScoredModel]:
    """Pivot, sources, SFT and targets of a merge, in this order."""
    sources: dict[str, ScoredModel] = {}
    targets = []
    for run in inputs.runs:
        record = read_lineage(run)
        models = [ModelConfig(**source) for source in record["sources"]]
        strong = {model.name: tuple(record["strong_skills"].get(model.name, [])) for model in models}
        sources |= {model.name: ScoredModel("source", model, strong[model.name]) for model in models}
        skills = tuple(skill for skills in strong.values() for skill in skills)
        target = ModelConfig(name=run.name, path=str(run.model))
        targets.append(ScoredModel("target", target, skills, run.recipe, run.report))
    sft = [inputs.sft] if inputs.sft else []
    return [ScoredModel("pivot", inputs.pivot), *sources.values(), *map(_sft_model, sft), *targets]


def _sft_model(run: TargetRun) -> ScoredModel:
    return ScoredModel("sft", ModelConfig(name="sft", path=str(run.model)), recipe=run.recipe)


def read_test_and_heldout(data: DataConfig) -> tuple[list[Dialogue], list[Dialogue]]:
    """Dialogues that are scored by exact match, and dialogues whose NLL is measured."""
    test = load_dialogues(data.test_path, data.split) if data.test_path else []
    heldout = load_dialogues(data.heldout_path, data.split) if data.heldout_path else load_splits(data)[1]
    return test, heldout


def score_models(
    models: Sequence[ScoredModel],
    data: DataConfig,
    evaluation: EvaluationConfig,
    paths: PathsConfig,
    seed: int,
    command: str,
) -> list[ComparisonRow]:
    """Score every model once (scores are cached by the model's content), each in its own chat template.

    The first model is the pivot; a source without a chat template reads the pivot's rendering.
    """
    test, heldout = read_test_and_heldout(data)
    samples = choose_samples(test, heldout, evaluation.samples, evaluation.sample_tokens)
    rows = []
    for scored in models:
        own = with_tokenizer(scored.model, scored.tokenizer)
        reader = scoring_reader(own, models[0].model, data.max_length)
        how = test, heldout, evaluation.batch_tokens
        if scored.weights is None:
            scores = score_folder(reader, *how, Path(paths.cache), samples)
        else:
            scores = score_weights(reader, scored.weights, *how, samples, scored.model)
        rows.append(comparison_row(scored, scores, seed, command))
    return rows


def comparison_row(scored: ScoredModel, scores: Scores, seed: int, command: str) -> ComparisonRow:
    return ComparisonRow(
        model=scored.model.name,
        kind=scored.kind,
        strategy="",
        seed=seed,
        path=scored.model.path,
        scores=scores.scores,
        nll_per_byte=scores.nll_per_byte,
        num_items=scores.num_items,
        command=command,
        parameters=scored.recipe,
        strong_skills=scored.strong_skills,
        alignment=scored.alignment,
        samples=scores.samples,
    )
