"""Merging model folders: in bounded memory, resumable, and visible only when complete."""

import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from fusion.cache import fingerprint, source_version
from fusion.config import UserError, raise_problems
from fusion.config.schema import EngineConfig
from fusion.merging.checkpoint import CONFIG_FILE, Checkpoint, is_adapter, links_outside, open_checkpoint
from fusion.merging.deltas import block_length
from fusion.merging.digests import Digests, Stamp
from fusion.merging.evidence import Evidence
from fusion.merging.manifest import HashedFolder, write_manifest
from fusion.merging.merger import Merge, merge_together
from fusion.merging.method import method_names
from fusion.merging.operands import NotFiniteError, not_finite
from fusion.merging.output import Output
from fusion.merging.plan import SHOWN, MergePlan, MergeRequest, input_labels, input_roles, state_problems
from fusion.merging.report import MergeReport
from fusion.merging.resources import Resources, checked_resources
from fusion.merging.statistics import TensorRecord
from fusion.merging.targets import open_target
from fusion.merging.vocabulary import ERROR, vocabulary_problems
from fusion.merging.working import measured_copy_speed, space_problems, unfinished

COMPANIONS = (
    CONFIG_FILE,
    "generation_config.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)


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
    One with another vocabulary is refused (`vocabulary="error"`), or counts by the base's tokens (`"base"`): its rows
    are found through the tokenisers in the folders, and tokens that it lacks keep the base's rows.

    `out` gets the base's (without base: the first target's) layout of weight files, config, tokeniser, chat template
    and generation config, and a `manifest.json` that `python -m fusion.merging.verify` checks. It appears, complete
    and flushed to the disk, by one rename; a merge that fails leaves nothing, and one that is killed leaves a hidden
    folder with which the same merge goes on.

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
    problems = [p for request in requests for p in request.problems(base is not None, len(targets))]
    problems += [problem for out in outs for problem in _out_problems(out)]
    is_measured = any(request.evidence is not None for request in requests)
    problems += vocabulary_problems(vocabulary, base is not None, is_measured)
    inputs = _open_inputs(base, targets, vocabulary, problems)
    problems += _architecture_problems(inputs) + state_problems(inputs)
    problems += space_problems(outs, _output_bytes(inputs))
    raise_problems(list(dict.fromkeys(problems)))
    opened_targets = [checkpoint for role, checkpoint in inputs.items() if role != "base"]
    plans = [request.plan(inputs.get("base"), opened_targets) for request in requests]
    for plan in plans:
        resources = checked_resources(plan, engine)
    try:
        with ExitStack() as stack:
            workings = [stack.enter_context(unfinished(out)) for out in outs]
            source = _reference(inputs).files[0].path
            copy_speed = measured_copy_speed(source, workings[0]) if engine.probe_disk else None
            reports = _merge_into(workings, plans, inputs, resources, vocabulary)
    except NotFiniteError as error:
        raise UserError(_spoilt(inputs) or error.problems) from error
    for report in reports:
        report.copy_speed, report.seconds = copy_speed, time.perf_counter() - started
        report.merged_together = len(reports)
    return reports


def _merge_into(
    workings: Sequence[Path],
    plans: Sequence[MergePlan],
    inputs: Mapping[str, Checkpoint],
    resources: Resources,
    vocabulary: str,
) -> list[MergeReport]:
    """Fill the working folders, going on from what an earlier attempt at the same merges has finished."""
    stamps = [Stamp.of(path) for path in _input_files(inputs)]
    pairs = list(zip(plans, workings, strict=True))
    outputs = [Output(plan, _reference(inputs), working, _key(plan, vocabulary, stamps)) for plan, working in pairs]
    merges = {Merge(output.plan, output, output.resumed): output for output in outputs}
    records = {output: dict(output.resumed) for output in outputs}
    with Digests(resources.threads, resources.checksums) as digests, ExitStack() as stack:
        commits = {output: stack.enter_context(output.commits()) for output in outputs}
        for merge, record in merge_together(list(merges), resources):
            output, name = merges[merge], record.name
            records[output][name] = record
            commits[output](record)
            for homes in (*(checkpoint.homes for checkpoint in inputs.values()), output.homes):
                digests.follow(homes[name].path, homes[name].end(name))
        for working in workings:
            _copy_companions(_reference(inputs), working)
        visible = {working: _visible_files(working) for working in workings}
        found = digests.all_of(_input_files(inputs), [path for paths in visible.values() for path in paths])
    changed = [stamp.path for stamp in stamps if Stamp.of(Path(stamp.path)) != stamp]
    raise_problems([f"{path}: was changed while it was merged: merge again" for path in changed])
    for plan, working in pairs:
        _write_manifest(plan, vocabulary, inputs, working, found)
    num_bytes = sum(stamp.num_bytes for stamp in stamps)
    return [_report(output, records[output], num_bytes, visible[output.working]) for output in outputs]


def _report(
    output: Output, records: Mapping[str, TensorRecord], bytes_read: int, written: Sequence[Path]
) -> MergeReport:
    report = MergeReport.of(output.plan, [records[name] for name in output.plan.merged_names])
    report.resumed, report.bytes_read = len(output.resumed), bytes_read
    report.bytes_written = sum(path.stat().st_size for path in written)
    return report


def _key(plan: MergePlan, vocabulary: str, stamps: Sequence[Stamp]) -> str:
    """What must be the same for a merge to go on with another's tensors."""
    own = [] if plan.method.name in method_names() else [plan.method.function.__module__]
    return fingerprint(
        {
            "request": [plan.method.name, plan.parameters, plan.scale, plan.seed, list(plan.inputs), vocabulary],
            "inputs": stamps,
            "evidence": plan.evidence.name if plan.evidence else None,
            "code": source_version("fusion.merging", *own),
        }
    )


def _reference(inputs: Mapping[str, Checkpoint]) -> Checkpoint:
    """Whose layout and companions the merged model gets."""
    return next(iter(inputs.values()))


def _output_bytes(inputs: Mapping[str, Checkpoint]) -> int:
    return sum(file.num_bytes for file in _reference(inputs).files) if inputs else 0


def _input_files(inputs: Mapping[str, Checkpoint]) -> list[Path]:
    """Weights and companions of all inputs, each once."""
    return list(dict.fromkeys(path for checkpoint in inputs.values() for path in _model_files(checkpoint)))


def _model_files(checkpoint: Checkpoint) -> list[Path]:
    return [file.path for file in checkpoint.files] + _companions(checkpoint)


def _visible_files(working: Path) -> list[Path]:
    return sorted(path for path in working.rglob("*") if path.is_file() and not path.name.startswith("."))


def _open_inputs(
    base: Path | None, targets: Sequence[Path], vocabulary: str, problems: list[str]
) -> dict[str, Checkpoint]:
    """The readable inputs by their roles; what is wrong with the others goes to `problems`."""
    opened: dict[str, Checkpoint] = {}
    for role, folder in input_roles(base and Path(base), [Path(target) for target in targets]).items():
        try:
            if role == "base":
                opened[role] = _without_links(open_checkpoint(folder))
            elif base is None or "base" in opened or not is_adapter(folder):
                opened[role] = _without_links(open_target(folder, opened.get("base"), vocabulary))
        except UserError as error:
            problems += [f"{role}: {problem}" for problem in error.problems]
    return opened


def _without_links(opened: Checkpoint) -> Checkpoint:
    raise_problems(links_outside(opened.folder, _model_files(opened)))
    return opened


def _spoilt(inputs: Mapping[str, Checkpoint]) -> list[str]:
    """All tensors that hold NaN or infinities; the first few of each input in full."""
    problems: list[str] = []
    for label, checkpoint in zip(input_labels(inputs), inputs.values(), strict=True):
        names = [name for name in checkpoint if not _is_finite(checkpoint, name)]
        problems += [not_finite(label, name) for name in names[:SHOWN]]
        if len(names) > SHOWN:
            problems.append(f"{label}: and {len(names) - SHOWN} more tensors with NaN or infinities")
    return problems


def _is_finite(checkpoint: Checkpoint, name: str) -> bool:
    """Read in the blocks of a merge, so that a large tensor never is in memory as a whole."""
    home = checkpoint.homes[name]
    spec = home.specs[name]
    length = block_length(spec.shape)
    for start in range(0, spec.num_elements if spec.dtype.is_floating_point else 0, length):
        block_N = torch.empty(min(length, spec.num_elements - start), dtype=spec.dtype)
        home.read_span(name, start, block_N)
        if not bool(block_N.isfinite().all()):
            return False
    return True


def _out_problems(out: Path) -> list[str]:
    if out.is_dir() and any(out.iterdir()):
        return [f"{out}: the output folder exists and is not empty: choose another, or delete it"]
    if out.exists() and not out.is_dir():
        return [f"{out}: the output exists and is not a folder: choose another name"]
    return []


def _architecture_problems(inputs: Mapping[str, Checkpoint]) -> list[str]:
    problems = []
    configs = [checkpoint.config for checkpoint in inputs.values()]
    labels = input_labels(inputs)
    for label, config in zip(labels, configs, strict=True):
        for key in ("model_type", "architectures"):
            mine, wanted = config.get(key), configs[0].get(key)
            if mine is not None and wanted is not None and mine != wanted:
                problems.append(f"{label}: {key} is {mine}, but {wanted} in {labels[0]}: merge one architecture only")
    return problems


def _companions(checkpoint: Checkpoint) -> list[Path]:
    """Files that make weights a model: never code, pickles, or another model's card."""
    index = [] if checkpoint.index is None else [checkpoint.index]
    found = {path for pattern in COMPANIONS for path in checkpoint.folder.glob(pattern) if path.is_file()}
    return sorted([*found, *index])


def _copy_companions(checkpoint: Checkpoint, working: Path) -> None:
    for path in _companions(checkpoint):
        copied = working / path.relative_to(checkpoint.folder)
        copied.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copied)


def _write_manifest(
    plan: MergePlan,
    vocabulary: str,
    inputs: Mapping[str, Checkpoint],
    working: Path,
    digests: Mapping[Path, str],
) -> None:
    request = {
        "method": plan.method.name,
        "paper": plan.method.paper,
        "parameters": plan.written_parameters,
        "scale": plan.scale,
        "seed": plan.seed,
        "vocabulary": vocabulary,
        "evidence": plan.evidence.name if plan.evidence else None,
    }
    sources = {
        role: HashedFolder.of(checkpoint.folder, _model_files(checkpoint), digests)
        for role, checkpoint in inputs.items()
    }
    write_manifest(working, request, sources, HashedFolder.of(working, _visible_files(working), digests))
