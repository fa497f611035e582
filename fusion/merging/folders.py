"""Merging model folders: in bounded memory, resumable, and visible only when complete."""

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from fusion.cache import FileState, fingerprint, source_version
from fusion.config import UserError, raise_problems
from fusion.config.rules import shard_problems
from fusion.config.schema import EngineConfig
from fusion.merging.checkpoints.card import CARD_FILE, Provenance, write_card
from fusion.merging.checkpoints.companions import copy_companions, model_files
from fusion.merging.checkpoints.digests import Digests
from fusion.merging.checkpoints.layout import Layout, layout_of
from fusion.merging.checkpoints.manifest import MANIFEST_FILE, HashedFolder, write_manifest
from fusion.merging.checkpoints.output import Output
from fusion.merging.checkpoints.working import measured_copy_speed, space_problems, unfinished
from fusion.merging.evidence import Evidence
from fusion.merging.inputs import Inputs
from fusion.merging.merger import Merge, merge_together
from fusion.merging.method import method_names
from fusion.merging.operands import NotFiniteError
from fusion.merging.plan import MergePlan, MergeRequest, state_problems
from fusion.merging.report import MergeReport
from fusion.merging.resources import Resources, checked_resources
from fusion.merging.statistics import TensorRecord
from fusion.merging.vocabularies.vocabulary import ERROR, vocabulary_problems


def merge_folders(
    method: str,
    base: Path | None,
    targets: Sequence[Path],
    out: Path,
    *,
    scale: float = 1.0,
    seed: int = 0,
    evidence: Evidence | None = None,
    vocabulary: str = ERROR,
    engine: EngineConfig = EngineConfig(),  # noqa: B008 - frozen
    **parameters: object,
) -> MergeReport:
    """Merge Hugging Face model folders into a new one at `out`; parameters as in `merge_state_dicts`.

    A target may be a LoRA adapter of the base (a folder of peft), whose weights are computed while they are read.
    Targets with another vocabulary are refused (`vocabulary="error"`), or their rows are found through the tokenisers
    in the folders: the merged model has the base's tokens (`"base"`), also those that only targets have, behind the
    base's (`"union"`), or those that all have, beside the base's special ones (`"intersect"`). A row that a model
    lacks is the base's, a delta of zero; where the base lacks it too, it is the mean of those that the others have.

    `out` gets the base's (without base: the first target's) weight files, or shards of at most `engine.shard_size`
    where these are larger, its config, tokeniser, chat template and generation config, a model card, and a
    `manifest.json` that `python -m fusion.merging.verify` checks. It appears, complete and flushed to the disk, by one
    rename; a merge that fails leaves nothing, and one that is killed leaves a hidden folder with which the same merge
    goes on.

    Raises:
        UserError: with all problems of the request and the folders before the first byte is written; all tensors with
            NaN or infinities once one is met, or an overflow as soon as it is.
    """
    request = MergeRequest(method, parameters, scale, seed, evidence)
    return merge_folders_together([request], base, targets, [out], vocabulary=vocabulary, engine=engine)[0]


def merge_folders_together(
    requests: Sequence[MergeRequest],
    base: Path | None,
    targets: Sequence[Path],
    outs: Sequence[Path],
    *,
    vocabulary: str = ERROR,
    engine: EngineConfig = EngineConfig(),  # noqa: B008 - frozen
) -> list[MergeReport]:
    """`merge_folders` for several requests, each into an `out` of its own: the inputs are read once for all.

    The models are those of separate merges, byte for byte.
    """
    started = time.perf_counter()
    outs = [Path(out).resolve() for out in outs]
    wrong_settings = list(shard_problems(engine))
    problems = [p for request in requests for p in request.problems(base is not None, len(targets))]
    problems += [problem for out in outs for problem in _out_problems(out)]
    is_measured = any(request.evidence is not None for request in requests)
    problems += vocabulary_problems(vocabulary, base is not None, is_measured)
    inputs = Inputs.open(base, targets, vocabulary, problems)
    problems += state_problems(inputs.checkpoints)
    if inputs.checkpoints and not wrong_settings:
        layout = layout_of(inputs.reference, engine.shard_size)
        problems += space_problems(outs, layout.num_bytes)
    raise_problems(list(dict.fromkeys(problems + wrong_settings)))
    plans = [request.plan(inputs.base, inputs.targets) for request in requests]
    for plan in plans:
        resources = checked_resources(plan, engine)
    try:
        with ExitStack() as stack:
            workings = [stack.enter_context(unfinished(out)) for out in outs]
            source = inputs.reference.files[0].path
            copy_speed = measured_copy_speed(source, workings[0]) if engine.probe_disk else None
            reports = _merge_into(workings, plans, inputs, layout, resources)
    except NotFiniteError as error:
        raise UserError(inputs.spoilt() or error.problems) from error
    for report in reports:
        report.copy_speed, report.seconds = copy_speed, time.perf_counter() - started
        report.merged_together = len(reports)
    return reports


def _merge_into(
    workings: Sequence[Path], plans: Sequence[MergePlan], inputs: Inputs, layout: Layout, resources: Resources
) -> list[MergeReport]:
    """Fill the working folders, going on from what an earlier attempt at the same merges has finished."""
    states = {path: FileState.of(path) for path in inputs.files}
    pairs = list(zip(plans, workings, strict=True))
    outputs = [Output(plan, layout, working, _key(plan, inputs, layout, states.values())) for plan, working in pairs]
    merges = {Merge(output.plan, output, output.resumed): output for output in outputs}
    records = {output: dict(output.resumed) for output in outputs}
    with Digests(resources.threads, resources.checksums) as digests, ExitStack() as stack:
        commits = {output: stack.enter_context(output.commits()) for output in outputs}
        for merge, record in merge_together(list(merges), resources):
            output, name = merges[merge], record.name
            records[output][name] = record
            commits[output](record)
            homes = [checkpoint.homes[name] for checkpoint in inputs.checkpoints.values()]
            written = output.homes[name]
            for home in [*homes, written] if written in output.in_order else homes:
                digests.follow(home.path, home.end(name))
        for working in workings:
            layout.write_index(working)
            copy_companions(inputs.reference, inputs.changes, working)
        visible = {working: _visible_files(working) for working in workings}
        found = digests.all_of(states, [path for paths in visible.values() for path in paths])
    changed = [path for path, state in states.items() if FileState.of(path).written != state.written]
    raise_problems([f"{path}: was changed while it was merged: merge again" for path in changed])
    num_bytes = sum(state.num_bytes for state in states.values())
    reports = [_report(output, records[output], num_bytes, visible[output.working]) for output in outputs]
    base = inputs.base.folder if inputs.base else None
    targets = [target.folder for target in inputs.targets]
    for report, (plan, working) in zip(reports, pairs, strict=True):
        _write_manifest(plan, inputs, working, found)
        write_card(working, report, Provenance.of_call(report, base, targets, inputs.vocabulary))
    return reports


def _report(
    output: Output, records: Mapping[str, TensorRecord], bytes_read: int, written: Sequence[Path]
) -> MergeReport:
    report = MergeReport.of(output.plan, [records[name] for name in output.plan.merged_names])
    report.resumed, report.bytes_read = len(output.resumed), bytes_read
    report.bytes_written = sum(path.stat().st_size for path in written)
    return report


def _key(plan: MergePlan, inputs: Inputs, layout: Layout, states: Iterable[FileState]) -> str:
    """What must be the same for a merge to go on with another's tensors."""
    own = [] if plan.method.name in method_names() else [plan.method.function.__module__]
    return fingerprint(
        {
            "request": [plan.method.name, plan.parameters, plan.scale, plan.seed, list(plan.inputs)],
            "vocabulary": inputs.vocabulary,
            "layout": layout.preambles,
            "inputs": [state.written for state in states],
            "evidence": plan.evidence.name if plan.evidence else None,
            "code": source_version("fusion.merging", *own),
        }
    )


def _visible_files(working: Path) -> list[Path]:
    """What the manifest lists: all but itself and the card."""
    files = (path for path in working.rglob("*") if path.is_file() and not path.name.startswith("."))
    return sorted(path for path in files if path.name not in (MANIFEST_FILE, CARD_FILE))


def _out_problems(out: Path) -> list[str]:
    if out.is_dir() and any(out.iterdir()):
        return [f"{out}: the output folder exists and is not empty: choose another, or delete it"]
    if out.exists() and not out.is_dir():
        return [f"{out}: the output exists and is not a folder: choose another name"]
    return []


def _write_manifest(plan: MergePlan, inputs: Inputs, working: Path, digests: Mapping[Path, str]) -> None:
    request = {
        "method": plan.method.name,
        "paper": plan.method.paper,
        "parameters": plan.written_parameters,
        "scale": plan.scale,
        "seed": plan.seed,
        "vocabulary": inputs.vocabulary,
        "missing_rows": inputs.missing_rows,
        "new_tokens": inputs.num_new_tokens,
        "evidence": plan.evidence.name if plan.evidence else None,
    }
    sources = {
        role: HashedFolder.of(checkpoint.folder, model_files(checkpoint), digests)
        for role, checkpoint in inputs.checkpoints.items()
    }
    write_manifest(working, request, sources, HashedFolder.of(working, _visible_files(working), digests))
