"""Merging model folders: in bounded memory, resumable, and visible only when complete."""

import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from fusion.cache import code_version, fingerprint
from fusion.config import UserError, raise_problems
from fusion.config.schema import EngineConfig
from fusion.merging.checkpoint import CONFIG_FILE, Checkpoint, open_checkpoint
from fusion.merging.digests import Digests, Stamp
from fusion.merging.engine import merge_tensors
from fusion.merging.evidence import Evidence
from fusion.merging.manifest import HashedFolder, write_manifest
from fusion.merging.method import method_names
from fusion.merging.output import Output
from fusion.merging.plan import MergePlan, input_labels, input_roles, make_plan, request_problems, state_problems
from fusion.merging.report import MergeReport
from fusion.merging.resources import Resources, checked_resources
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
    engine: EngineConfig = EngineConfig(),  # noqa: B008 - frozen
    **parameters: object,
) -> MergeReport:
    """Merge Hugging Face model folders into a new one at `out`; parameters as in `merge_state_dicts`.

    `out` gets the base's (without base: the first target's) layout of weight files, config, tokeniser, chat template
    and generation config, and a `manifest.json` that `python -m fusion.merging.verify` checks. It appears, complete
    and flushed to the disk, by one rename; a merge that fails leaves nothing, and one that is killed leaves a hidden
    folder with which the same merge goes on.

    Raises:
        UserError: with all problems of the request and the folders before the first byte is written; NaN and
            infinities in a tensor, or an overflow, as soon as they are met.
    """
    started = time.perf_counter()
    out = Path(out).resolve()
    problems = request_problems(method, base is not None, len(targets), scale, seed, parameters, evidence)
    problems += _out_problems(out)
    inputs = _open_inputs(base, targets, problems)
    problems += _architecture_problems(inputs) + state_problems(inputs)
    raise_problems(problems + space_problems(out, _output_bytes(inputs)))
    opened_targets = [checkpoint for role, checkpoint in inputs.items() if role != "base"]
    plan = make_plan(
        method,
        inputs.get("base"),
        opened_targets,
        scale=scale,
        seed=seed,
        parameters=parameters,
        evidence=evidence,
    )
    resources = checked_resources(plan, engine)
    with unfinished(out) as working:
        copy_speed = measured_copy_speed(_reference(inputs).files[0].path, working) if engine.probe_disk else None
        report = _merge_into(working, plan, inputs, resources)
    report.copy_speed, report.seconds = copy_speed, time.perf_counter() - started
    return report


def _merge_into(working: Path, plan: MergePlan, inputs: Mapping[str, Checkpoint], resources: Resources) -> MergeReport:
    """Fill the working folder, going on from what an earlier attempt at the same merge has finished."""
    stamps = [Stamp.of(path) for path in _input_files(inputs)]
    output = Output(plan, _reference(inputs), working, _key(plan, stamps))
    records = dict(output.resumed)
    with Digests(resources.threads, resources.checksums) as digests:
        for record in output.commit(merge_tensors(plan, resources, output, output.resumed)):
            records[record.name] = record
            for file in (
                *(checkpoint.homes[record.name] for checkpoint in inputs.values()),
                output.homes[record.name],
            ):
                digests.follow(file.path, file.end(record.name))
        _copy_companions(_reference(inputs), working)
        found = digests.all_of(_input_files(inputs), _visible_files(working))
    changed = [stamp.path for stamp in stamps if Stamp.of(Path(stamp.path)) != stamp]
    raise_problems([f"{path}: was changed while it was merged: merge again" for path in changed])
    report = MergeReport.of(plan, [records[name] for name in plan.merged_names])
    report.resumed = len(output.resumed)
    report.bytes_read = sum(stamp.num_bytes for stamp in stamps)
    report.bytes_written = sum(path.stat().st_size for path in _visible_files(working))
    _write_manifest(plan, inputs, working, found)
    return report


def _key(plan: MergePlan, stamps: Sequence[Stamp]) -> str:
    """What must be the same for a merge to go on with another's tensors."""
    own = [] if plan.method.name in method_names() else [plan.method.function.__module__]
    return fingerprint(
        {
            "request": [plan.method.name, plan.parameters, plan.scale, plan.seed, list(plan.inputs)],
            "inputs": stamps,
            "evidence": plan.evidence.name if plan.evidence else None,
            "code": code_version("fusion.merging", *own),
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


def _open_inputs(base: Path | None, targets: Sequence[Path], problems: list[str]) -> dict[str, Checkpoint]:
    """The readable inputs by their roles; what is wrong with the others goes to `problems`."""
    opened = {}
    for role, folder in input_roles(base, targets).items():
        try:
            opened[role] = open_checkpoint(Path(folder))
        except UserError as error:
            problems += [f"{role}: {problem}" for problem in error.problems]
    return opened


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
    plan: MergePlan, inputs: Mapping[str, Checkpoint], working: Path, digests: Mapping[Path, str]
) -> None:
    request = {
        "method": plan.method.name,
        "paper": plan.method.paper,
        "parameters": plan.written_parameters,
        "scale": plan.scale,
        "seed": plan.seed,
        "evidence": plan.evidence.name if plan.evidence else None,
    }
    sources = {
        role: HashedFolder.of(checkpoint.folder, _model_files(checkpoint), digests)
        for role, checkpoint in inputs.items()
    }
    write_manifest(working, request, sources, HashedFolder.of(working, _visible_files(working), digests))
