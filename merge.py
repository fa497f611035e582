"""Stage 2: the targets become one model by merging in parameter space, which is scored and compared.

python merge.py                                                   # the targets of the last stage-1 runs, by SCE
python merge.py -m merge=linear,task_arithmetic,ties,varm,sce merge.scale=search
python merge.py merge=task_arithmetic targets=[/models/a,/models/b] base=/models/pivot
"""

from typing import TYPE_CHECKING, Any

from fusion.config.errors import raise_problems
from fusion.config.launch import Job, launch
from fusion.config.schema import MergeConfig

if TYPE_CHECKING:
    from fusion.merging import Evidence, MergeReport, ScaleSearch
    from fusion.tracking.inputs import MergeInputs
    from fusion.tracking.record import RunRecord
    from fusion.tracking.rows import ComparisonRow

SEARCH = "search"


def run(config: MergeConfig, job: Job) -> None:
    """One job: find the targets, skip the job when it is finished, else merge, score and record."""
    from fusion.cache import code_version, fingerprint
    from fusion.tracking.inputs import find_inputs
    from fusion.tracking.record import RunRecord, is_finished

    inputs = find_inputs(config)
    code = code_version("fusion", "merge")
    name = fingerprint({"settings": config.result_settings(), "inputs": inputs.identity, "code": code})
    if config.skip_finished and is_finished(job.folder, name):
        print(f"{job.name}: finished before with the same settings and targets; skip_finished=false runs it again")
        return
    with RunRecord(job, "merge", config.seed, name) as record:
        merge(config, job, inputs, record)


def merge(config: MergeConfig, job: Job, inputs: "MergeInputs", record: "RunRecord") -> None:
    """The stage itself; the heavy libraries are loaded here, so that `--help` and skipped jobs answer at once."""
    import shutil

    import torch

    from fusion.merging import merge_folders
    from fusion.tracking.loggers import job_loggers, log_scores
    from fusion.tracking.merge_page import write_merge_page
    from fusion.tracking.mirror import mirror_result
    from fusion.tracking.sweep import compare_folder

    torch.set_num_threads(config.threads)
    method, wanted, parameters = checked_request(config.merge, len(inputs.targets))
    print(f"{method} of {', '.join(target.name for target in inputs.targets)} on {inputs.base}")
    evidence = evidence_for(config, inputs, method, parameters)
    record.lap("measure")
    search = search_for_scale(config, inputs, method, parameters, evidence) if wanted == SEARCH else None
    scale = search.best if search else float(wanted)
    record.lap("search")
    model = job.folder / "model"
    shutil.rmtree(model, ignore_errors=True)  # of an earlier attempt with other settings
    folders = [target.path for target in inputs.targets]
    settings = {"scale": scale, "seed": config.seed, "engine": config.engine, "evidence": evidence, **parameters}
    report = merge_folders(method, inputs.base, folders, model, **settings)
    record.lap("merge")
    with job_loggers(config.logger, job, "merge", config.tags, record.fingerprint) as loggers:
        rows = score(config, job, inputs, report, search)
        if rows:
            log_scores(loggers, rows[-1].scores, rows[-1].nll_per_byte)
        record.lap("score")
        result = {
            "merge": report.to_dict(),
            "targets": [target.name for target in inputs.targets],
            "scale": scale,
            "scale_search": search.evaluations if search else [],
            "model": "model",
            "comparison": [row.to_json() for row in rows],
        }
        origin = inputs.lineage()
        mirror_result(loggers, "merge", job.folder, result, origin)
    write_merge_page(job.folder, report.to_dict(), [target.name for target in inputs.targets], job.command)
    record.finish(result, origin)
    if job.sweep is None:
        compare_folder(job.folder, job.command)


def checked_request(merge: dict[str, Any], num_targets: int) -> tuple[str, float | str, dict[str, Any]]:
    """Method, scale (a number or `search`) and parameters; every mistake in them in one UserError."""
    from fusion.merging import check_parameters

    parameters = {name: value for name, value in merge.items() if name not in ("method", "scale")}
    scale = merge.get("scale", 1.0)
    problems = check_parameters(str(merge["method"]), parameters, num_targets=num_targets)
    if scale != SEARCH and (isinstance(scale, bool) or not isinstance(scale, int | float)):
        problems.append(f"merge.scale={scale}: a number is expected, or {SEARCH}")
    raise_problems(problems)
    return str(merge["method"]), scale, parameters


def evidence_for(
    config: MergeConfig, inputs: "MergeInputs", method: str, parameters: dict[str, Any]
) -> "Evidence | None":
    """What the method weighs by, measured on held-out dialogues that some source won; None for most methods."""
    from fusion.evaluation.search import heldout_study
    from fusion.merging import load_method, measure

    if load_method(method).evidence is None:
        return None
    return measure(method, heldout_study(config, inputs, method), **parameters)


def search_for_scale(
    config: MergeConfig,
    inputs: "MergeInputs",
    method: str,
    parameters: dict[str, Any],
    evidence: "Evidence | None",
) -> "ScaleSearch":
    """The scale with the lowest cross-entropy on held-out dialogues that some source won: one merge, many scales."""
    from fusion.evaluation.search import data_with_heldout, heldout_loss
    from fusion.merging import merge_deltas, search_scale
    from fusion.merging.checkpoint import open_checkpoint

    data = data_with_heldout(inputs, f"merge.scale={SEARCH}", "give a number")
    base = open_checkpoint(inputs.base) if inputs.base else None
    targets = [open_checkpoint(target.path) for target in inputs.targets]
    merged = merge_deltas(method, base, targets, seed=config.seed, evidence=evidence, **parameters)
    loss = heldout_loss(inputs.pivot, inputs.heldout_won, data.max_length, config.evaluation.batch_tokens)
    search = search_scale(lambda scale: loss(merged.at_scale(scale)))
    print(f"scale {search.best:.3g} found in {len(search.evaluations)} evaluations")
    return search


def score(
    config: MergeConfig, job: Job, inputs: "MergeInputs", report: "MergeReport", search: "ScaleSearch | None"
) -> "list[ComparisonRow]":
    """Rows of the pivot, the sources, SFT, the targets and the merged model (last)."""
    from dataclasses import replace

    from fusion.config.schema import ModelConfig
    from fusion.evaluation.compare import ScoredModel, models_of_merge, score_models

    if config.evaluation.name == "none" or inputs.data is None:
        return []
    merged = ScoredModel("merged", ModelConfig(name=report.method, path=str(job.folder / "model")))
    rows = score_models(
        [*models_of_merge(inputs), merged], inputs.data, config.evaluation, config.paths, config.seed, job.command
    )
    names = [target.name for target in inputs.targets]
    rows[-1] = replace(
        rows[-1],
        strategy=report.method,
        scale=report.scale,
        scale_searched=search is not None,
        coefficients=dict(zip(names, report.mean_coefficients, strict=True)),
        parameters={**report.parameters, "targets": inputs.recipe},
    )
    return rows


def main() -> None:
    """Console entry point `fusion-merge`."""
    launch("merge", run)


if __name__ == "__main__":
    main()
