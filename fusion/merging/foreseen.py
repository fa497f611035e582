"""A merge foreseen: its model's sizes, and all mistakes that it would be refused for, from headers alone."""

from collections.abc import Sequence
from pathlib import Path

from fusion.config import raise_problems
from fusion.config.schema import EngineConfig
from fusion.merging.checkpoints.layout import layout_of
from fusion.merging.inputs import Inputs
from fusion.merging.method import load_method
from fusion.merging.parameters import with_defaults
from fusion.merging.plan import MergePlan, MergeRequest, state_problems
from fusion.merging.resources import largest_whole
from fusion.merging.vocabularies.vocabulary import vocabulary_problems
from fusion.planning.stage2 import MergedModel


def foreseen(
    request: MergeRequest, base: Path | None, targets: Sequence[Path], vocabulary: str, engine: EngineConfig
) -> MergedModel:
    """What `merge_folders` would make of these folders; nothing needs to be measured for it.

    Raises:
        UserError: with all problems that the merge would be refused for.
    """
    method = load_method(request.method)
    is_measured = method.evidence is not None
    problems = vocabulary_problems(vocabulary, base is not None, is_measured)
    if not is_measured:
        problems += request.problems(base is not None, len(targets))
    inputs = Inputs.open(base, targets, vocabulary, problems)
    raise_problems(list(dict.fromkeys(problems + state_problems(inputs.checkpoints))))
    if is_measured:  # a plan with the evidence is made once that is there
        parameters = with_defaults(method, request.parameters)
        plan = MergePlan(method, parameters, inputs.base, tuple(inputs.targets), request.scale, request.seed)
    else:
        plan = request.plan(inputs.base, inputs.targets)
    return MergedModel(
        num_bytes=layout_of(inputs.reference, engine.shard_size).num_bytes,
        parameters=plan.num_elements,
        largest_whole=largest_whole(plan)[0],
        is_measured=is_measured,
        new_tokens=inputs.num_new_tokens,
    )
