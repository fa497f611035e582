"""Merging model folders: streamed tensor by tensor, and visible only when complete."""

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from fusion.cache import fsync_tree
from fusion.config import UserError, raise_problems
from fusion.merging.checkpoint import CONFIG_FILE, Checkpoint, open_checkpoint
from fusion.merging.engine import merge_stream, new_report
from fusion.merging.manifest import write_manifest
from fusion.merging.plan import MergePlan, input_labels, input_roles, make_plan, request_problems, state_problems
from fusion.merging.report import MergeReport

LOCK_FILE = ".lock"
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
    **parameters: object,
) -> MergeReport:
    """Merge Hugging Face model folders into a new one at `out`; parameters as in `merge_state_dicts`.

    `out` gets the base's (without base: the first target's) layout of weight files, config, tokeniser, chat template
    and generation config, and a `manifest.json` that `python -m fusion.merging.verify` checks. It appears, complete
    and flushed to the disk, by one rename; a merge that fails or is killed leaves no `out`.

    Raises:
        UserError: with all problems of the request and the folders before the first byte is written; NaN and
            infinities in a tensor, or an overflow, as soon as they are met.
    """
    started = time.perf_counter()
    out = Path(out).resolve()
    problems = request_problems(method, base is not None, len(targets), scale, seed, parameters)
    problems += _out_problems(out)
    inputs = _open_inputs(base, targets, problems)
    raise_problems(problems + _architecture_problems(inputs) + state_problems(inputs))
    opened_targets = [checkpoint for role, checkpoint in inputs.items() if role != "base"]
    plan = make_plan(method, inputs.get("base"), opened_targets, scale=scale, seed=seed, parameters=parameters)
    report = new_report(plan)
    with _unfinished(out) as working:
        _write_model(plan, next(iter(inputs.values())), working, report)
        _write_manifest(plan, inputs, working)
    report.seconds = time.perf_counter() - started
    return report


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


@contextmanager
def _unfinished(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out` that becomes `out` when the block ends well, and goes when it does not."""
    working = out.with_name(f".{out.name}.merging")
    working.mkdir(parents=True, exist_ok=True)
    lock = FileLock(working / LOCK_FILE, blocking=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise UserError(f"{out}: another process is merging into it: wait for it, or choose another name") from error
    try:
        _clear(working)
        yield working
        fsync_tree(working)
        working.rename(out)
        (out / LOCK_FILE).unlink(missing_ok=True)
    except BaseException:
        shutil.rmtree(working, ignore_errors=True)
        raise
    finally:
        lock.release()


def _clear(working: Path) -> None:
    """Remove what a killed merge left."""
    for path in working.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK_FILE:
            path.unlink()


def _write_model(plan: MergePlan, reference: Checkpoint, working: Path, report: MergeReport) -> None:
    """The merged weights in the reference's files and order, and the files that belong to them."""
    copies = {file.path: file.copy_layout(working / file.path.name) for file in reference.files}
    for merged in merge_stream(plan, report):
        copies[reference.homes[merged.name].path].write(merged.name, merged.at_scale(plan.scale))
    for name in plan.copied_names:
        copies[reference.homes[name].path].write(name, reference[name])
    for path in _companions(reference):
        copied = working / path.relative_to(reference.folder)
        copied.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copied)
    report.bytes_written = sum(path.stat().st_size for path in working.rglob("*") if path.is_file())


def _companions(checkpoint: Checkpoint) -> list[Path]:
    """Files that make weights a model: never code, pickles, or another model's card."""
    index = [] if checkpoint.index is None else [checkpoint.index]
    found = {path for pattern in COMPANIONS for path in checkpoint.folder.glob(pattern) if path.is_file()}
    return sorted([*found, *index])


def _write_manifest(plan: MergePlan, inputs: Mapping[str, Checkpoint], working: Path) -> None:
    request = {
        "method": plan.method.name,
        "paper": plan.method.paper,
        "parameters": dict(plan.parameters),
        "scale": plan.scale,
        "seed": plan.seed,
    }
    sources = {
        role: (checkpoint.folder, [file.path for file in checkpoint.files] + _companions(checkpoint))
        for role, checkpoint in inputs.items()
    }
    write_manifest(working, request, sources)
