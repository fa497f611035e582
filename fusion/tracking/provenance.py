"""Where a merged model comes from, for its card: models, their sources as stage 1 recorded them, and scores."""

from collections.abc import Sequence

from fusion.config.schema import ModelConfig
from fusion.merging.checkpoints.card import Ancestor, Provenance
from fusion.tracking.inputs import MergeInputs
from fusion.tracking.rows import ComparisonRow


def merge_provenance(inputs: MergeInputs, rows: Sequence[ComparisonRow], command: str) -> Provenance:
    """Of a job of merge.py that scored these models, the merged one last."""
    base = None
    if inputs.base:
        base = Ancestor(inputs.pivot.name if inputs.runs else inputs.base.name, str(inputs.base))
    sources = inputs.sources
    targets = [
        Ancestor(target.name, str(target.path), _listed(sources.get(target.name, []))) for target in inputs.targets
    ]
    scores = [(f"{row.kind} {row.model}", {**row.scores, "NLL per byte": row.nll_per_byte}) for row in rows]
    return Provenance(base, targets, command, scores)


def _listed(models: Sequence[ModelConfig]) -> str:
    return ", ".join(f"{model.name} (`{model.path}`)" for model in models)
