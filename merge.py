"""Stage 2: the targets become one model by merging in parameter space, which is scored and compared.

python merge.py                                                   # the targets of the last stage-1 runs, by SCE
python merge.py -m merge=linear,task_arithmetic,ties,varm,sce merge.scale=search
python merge.py -m merge=sce merge.tau=0.05,0.1,0.2 sweep=fused save=false   # inputs read once, only scores kept
python merge.py merge=task_arithmetic targets=[/models/a,/models/b] base=/models/pivot
"""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from fusion.config.errors import UserError, raise_problems
from fusion.config.launch import Job, Jobs, launch
from fusion.config.schema import MergeConfig

if TYPE_CHECKING:
    from torch import Tensor

    from fusion.merging import Evidence, MergedDeltas, MergeReport, MergeRequest, ScaleSearch
    from fusion.tracking.inputs import MergeInputs
    from fusion.tracking.record import RunRecord
    from fusion.tracking.rows import ComparisonRow

MODEL = "model"
DELTA_BYTES = 4


@dataclass
class Task:
    """A job that is to be done: what it works on, and what its settings ask for."""

    config: MergeConfig
    job: Job
    inputs: "MergeInputs"
    record: "RunRecord"
    method: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)
    scale: float | None = 1.0
    """None until a search has found it."""
    evidence: "Evidence | None" = None
    search: "ScaleSearch | None" = None
    tokenizer: Path | None = None
    """Folder of the tokeniser of merged weights while they are in memory."""

    @property
    def request(self) -> "MergeRequest":
        from fusion.merging import MergeRequest

        scale = 1.0 if self.scale is None else self.scale
        return MergeRequest(self.method, self.parameters, scale, self.config.seed, self.evidence)

    @property
    def targets(self) -> list[str]:
        return [target.name for target in self.inputs.targets]


def run(config: MergeConfig, job: Job) -> float | None:
    """One job: find the targets, skip the job when it is finished, else merge, score and record.

    Returns what a search over settings minimises, where `search_value` asks for it.
    """
    from fusion.tracking.record import read_result

    task = begin(config, job)
    if task:
        merge([task])
    return read_result(job.folder).get("search_value")


def run_together(jobs: Jobs) -> None:
    """The jobs of a sweep: those that work on the same targets in the same way are merged in one pass."""
    from fusion.tracking.sweep import compare_folder, sweep_command

    groups: dict[str, list[Task]] = {}
    problems = []
    for config, job in jobs:
        try:
            if task := begin(config, job):
                groups.setdefault(_shared(task), []).append(task)
        except UserError as error:
            problems += [f"{job.name}: {problem}" for problem in error.problems]
    for tasks in groups.values():
        try:
            merge(tasks)
        except UserError as error:
            problems += error.problems
    compare_folder(jobs[0][1].folder.parent, sweep_command())
    raise_problems(problems)


def begin(config: MergeConfig, job: Job) -> Task | None:
    """The job with its inputs; None when it is finished already, or only planned."""
    from fusion.cache import code_version, fingerprint
    from fusion.tracking.inputs import find_inputs
    from fusion.tracking.record import RunRecord, is_finished

    try:
        inputs = find_inputs(config)
    except UserError as error:
        raise UserError([*error.problems, *method_problems(config)]) from error
    if config.plan:
        show_plan(config, inputs)
        return None
    code = code_version("fusion", "merge")
    name = fingerprint({"settings": config.result_settings(), "inputs": inputs.identity, "code": code})
    if config.skip_finished and is_finished(job.folder, name):
        print(f"{job.name}: finished before with the same settings and targets; skip_finished=false runs it again")
        return None
    return Task(config, job, inputs, RunRecord(job, "merge", config.seed, name))


def _shared(task: Task) -> str:
    """What tasks must have in common to be merged together: what they read, and how."""
    from fusion.cache import fingerprint

    same = {name: getattr(task.config, name) for name in ("vocabulary", "engine", "save", "threads")}
    return fingerprint({"inputs": task.inputs.identity, **same})


def show_plan(config: MergeConfig, inputs: "MergeInputs") -> None:
    """What the merge would need, and whether it is here; raises UserError where it would be refused for its inputs."""
    from fusion.merging import MergeRequest
    from fusion.merging.foreseen import foreseen
    from fusion.merging.settings import asked
    from fusion.planning.stage2 import Stage2Plan
    from fusion.planning.text import verdict

    folders = [target.path for target in inputs.targets]
    wanted = asked(config, len(folders))
    scale = 1.0 if wanted.scale is None else wanted.scale
    request = MergeRequest(wanted.method, wanted.parameters, scale, config.seed)
    model = foreseen(request, inputs.base, folders, config.vocabulary, config.engine)
    plan = Stage2Plan.of(config, model, inputs.base, folders)
    print(f"{plan.text()}\n{verdict(plan.problems())}")


def merge(tasks: "Sequence[Task]") -> None:
    """The stage itself; the heavy libraries are loaded here, so that `--help` and skipped jobs answer at once."""
    import torch

    torch.set_num_threads(tasks[0].config.threads)
    problems: list[str] = []
    with ExitStack() as records:
        check = check_alone(tasks)
        ready = [task for task in tasks if is_ready(task, check, records, problems)]
        try:
            if ready:
                (merge_and_save if ready[0].config.save else merge_and_score)(ready)
        except UserError as error:
            raise UserError([*problems, *_of(ready, error)]) from error
    raise_problems(problems)


def check_alone(tasks: "Sequence[Task]") -> Callable[[Task], None]:
    """A function that raises what is wrong with one of several jobs alone, and would stop the pass of all."""
    from fusion.merging.inputs import Inputs
    from fusion.merging.resources import checked_resources

    first = tasks[0]
    folders = [target.path for target in first.inputs.targets]
    try:
        opened = Inputs.open(first.inputs.base, folders, first.config.vocabulary) if len(tasks) > 1 else None
    except UserError:  # of all jobs: the merge itself says it once
        opened = None

    def check(task: Task) -> None:
        if opened is not None:
            checked_resources(task.request.plan(opened.base, opened.targets), task.config.engine)

    return check


def is_ready(task: Task, check: Callable[[Task], None], records: ExitStack, problems: list[str]) -> bool:
    """Whether the job can be merged; a mistake in it stops no other one. Its record ends with `records`."""
    try:
        with ExitStack() as own:
            own.enter_context(task.record)
            prepare(task)
            check(task)
            records.enter_context(own.pop_all())
    except UserError as error:
        problems += _of([task], error)
        return False
    return True


def _of(tasks: "Sequence[Task]", error: UserError) -> list[str]:
    """The problems of an error, with the jobs of a sweep that they are about; a job alone needs no name."""
    names = ", ".join(task.job.name for task in tasks)
    return [f"{names}: {problem}" if tasks[0].config.sweep == "fused" else problem for problem in error.problems]


def prepare(task: Task) -> None:
    from fusion.merging import load_method
    from fusion.merging.settings import asked
    from fusion.merging.vocabularies.vocabulary import vocabulary_problems

    task.method, task.parameters, task.scale = asked(task.config, len(task.inputs.targets))
    is_measured = load_method(task.method).evidence is not None
    raise_problems(vocabulary_problems(task.config.vocabulary, task.inputs.base is not None, is_measured))
    print(f"{task.method} of {', '.join(task.targets)} on {task.inputs.base or 'no base'}")
    task.evidence = evidence_for(task.config, task.inputs, task.method, task.parameters)
    task.record.lap("measure")


def merge_and_save(tasks: "Sequence[Task]") -> None:
    """Write the merged models into the folders of the jobs, and score them there."""
    from fusion.merging import merge_folders_together

    for task, merged in in_memory([task for task in tasks if task.scale is None]):
        search_for_scale(task, merged)
    inputs, outs = tasks[0].inputs, [task.job.folder / MODEL for task in tasks]
    for out in outs:
        shutil.rmtree(out, ignore_errors=True)  # of an earlier attempt with other settings
    folders, requests = [target.path for target in inputs.targets], [task.request for task in tasks]
    vocabulary, engine = tasks[0].config.vocabulary, tasks[0].config.engine
    reports = merge_folders_together(requests, inputs.base, folders, outs, vocabulary=vocabulary, engine=engine)
    for task in tasks:
        task.record.lap("merge")
    for task, report in zip(tasks, reports, strict=True):
        finish(task, report)


def merge_and_score(tasks: "Sequence[Task]") -> None:
    """Score the merged models straight from memory; none is written."""
    for task, merged in in_memory(tasks):
        if task.scale is None:
            search_for_scale(task, merged)
        merged.report.scale = task.request.scale
        finish(task, merged.report, merged.at_scale(task.request.scale))


def in_memory(tasks: "Sequence[Task]") -> "Iterator[tuple[Task, MergedDeltas]]":
    """The merged deltas of all tasks: as many at once as `engine.memory` holds, for which the inputs are read once."""
    from fusion.config.sizes import num_bytes
    from fusion.merging import merge_deltas_together
    from fusion.merging.checkpoints.companions import copy_companions
    from fusion.merging.inputs import Inputs

    if not tasks:
        return
    inputs, engine, vocabulary = tasks[0].inputs, tasks[0].config.engine, tasks[0].config.vocabulary
    opened = Inputs.open(inputs.base, [target.path for target in inputs.targets], vocabulary)
    base, targets = opened.base, opened.targets
    size = sum(DELTA_BYTES * spec.num_elements for spec in targets[0].specs.values())
    at_once = max(1, num_bytes(engine.memory) // size)
    with TemporaryDirectory(prefix="fusion-tokenizer-") as folder:
        tokenizer = Path(folder) if opened.changes.written else None  # otherwise it is the base's
        if tokenizer:
            copy_companions(opened.reference, opened.changes, tokenizer)
        for first in range(0, len(tasks), at_once):
            some = tasks[first : first + at_once]
            merged = merge_deltas_together([task.request for task in some], base, targets, engine=engine)
            for task in some:
                task.tokenizer = tokenizer
                task.record.lap("merge")
            yield from zip(some, merged, strict=True)
    for task in tasks:
        task.tokenizer = None


def search_for_scale(task: Task, merged: "MergedDeltas") -> None:
    """The scale with the lowest cross-entropy on held-out dialogues that some source won: one merge, many scales."""
    from fusion.evaluation.search import data_with_heldout, heldout_loss
    from fusion.merging import search_scale

    inputs = task.inputs
    data = data_with_heldout(inputs, "merge.scale=search", "give a number")
    settings = (inputs.heldout_won, data.max_length, task.config.evaluation.batch_tokens)
    loss = heldout_loss(inputs.pivot, *settings, task.tokenizer)
    task.search = search_scale(lambda scale: loss(merged.at_scale(scale)))
    task.scale = task.search.best
    print(f"scale {task.scale:.3g} found in {len(task.search.evaluations)} evaluations")
    task.record.lap("search")


def finish(task: Task, report: "MergeReport", weights: "Mapping[str, Tensor] | None" = None) -> None:
    """Score the merged model, which is `weights` or lies in the job's folder, and record all about it."""
    from fusion.merging.checkpoints.card import write_card
    from fusion.tracking.loggers import job_loggers, log_scores
    from fusion.tracking.merge_page import write_merge_page
    from fusion.tracking.mirror import mirror_result
    from fusion.tracking.provenance import merge_provenance
    from fusion.tracking.sweep import compare_folder

    config, job, record = task.config, task.job, task.record
    with job_loggers(config.logger, job, "merge", config.tags, record.fingerprint) as loggers:
        rows, value = score(task, report, weights), search_value(task, weights)
        if rows:
            rows[-1] = replace(rows[-1], search_value=value)
            log_scores(loggers, rows[-1].scores, rows[-1].nll_per_byte)
        record.lap("score")
        if weights is None:
            write_card(job.folder / MODEL, report, merge_provenance(task.inputs, rows, job.command))
        result = {
            "merge": report.to_dict(),
            "targets": task.targets,
            "scale": report.scale,
            "scale_search": task.search.evaluations if task.search else [],
            "search_value": value,
            "model": MODEL if weights is None else None,
            "comparison": [row.to_json() for row in rows],
        }
        origin = task.inputs.lineage()
        mirror_result(loggers, "merge", job.folder, result, origin)
    write_merge_page(job.folder, report.to_dict(), task.targets, job.command)
    record.finish(result, origin)
    print(f"{job.folder / (MODEL if weights is None else 'merge.html')}: {report.method} at scale {report.scale:.3g}")
    if job.sweep is None:
        compare_folder(job.folder, job.command)


def search_value(task: Task, weights: "Mapping[str, Tensor] | None") -> float | None:
    """Cross-entropy of the merged model on held-out dialogues that a source won, in nats per byte."""
    from fusion.evaluation.search import data_with_heldout, folder_loss, heldout_loss

    config, inputs = task.config, task.inputs
    if config.search_value is None:
        return None
    data = data_with_heldout(inputs, f"search_value={config.search_value}", "leave it out")
    settings = (inputs.heldout_won, data.max_length, config.evaluation.batch_tokens)
    if weights is not None:
        return heldout_loss(inputs.pivot, *settings, task.tokenizer)(weights)
    return folder_loss(replace(inputs.pivot, path=str(task.job.folder / MODEL)), *settings)


def evidence_for(
    config: MergeConfig, inputs: "MergeInputs", method: str, parameters: dict[str, Any]
) -> "Evidence | None":
    """What the method weighs by, measured on held-out dialogues that some source won; None for most methods."""
    from fusion.evaluation.search import heldout_study
    from fusion.merging import load_method, measure

    if load_method(method).evidence is None:
        return None
    return measure(method, heldout_study(config, inputs, method), **parameters)


def score(task: Task, report: "MergeReport", weights: "Mapping[str, Tensor] | None" = None) -> "list[ComparisonRow]":
    """Rows of the pivot, the sources, SFT, the targets and the merged model (last).

    Merged `weights` are scored in the model of the base (without base: the first target's), whose layout they have,
    with the merged model's tokeniser.
    """
    from fusion.config.schema import ModelConfig
    from fusion.evaluation.compare import ScoredModel, models_of_merge, score_models

    config, job, inputs = task.config, task.job, task.inputs
    if config.evaluation.name == "none" or inputs.data is None:
        return []
    saved = job.folder / MODEL
    folder = saved if weights is None else inputs.base or inputs.targets[0].path
    tokenizer = None if weights is None else task.tokenizer
    merged = ScoredModel(
        "merged", ModelConfig(name=report.method, path=str(folder)), weights=weights, tokenizer=tokenizer
    )
    rows = score_models(
        [*models_of_merge(inputs), merged], inputs.data, config.evaluation, config.paths, config.seed, job.command
    )
    rows[-1] = replace(
        rows[-1],
        path=str(saved),
        strategy=report.method,
        scale=report.scale,
        scale_searched=task.search is not None,
        coefficients=dict(zip(task.targets, report.mean_coefficients, strict=True)),
        parameters={**report.parameters, "targets": inputs.recipe},
    )
    return rows


def method_problems(config: MergeConfig) -> list[str]:
    """What is wrong with the method and its parameters, to be told with other mistakes."""
    from fusion.merging.settings import asked_problems

    return asked_problems(config)


def main() -> None:
    """Console entry point `fusion-merge`."""
    launch("merge", run, run_together, method_problems)


if __name__ == "__main__":
    main()
