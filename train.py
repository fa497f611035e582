"""Stage 1: the pivot and a source read the same dialogues, and a copy of the pivot learns what they fuse to.

python train.py                                  # the built-in world: tiny pivot + one tiny source -> a target
python train.py -m source=tiny_a,tiny_b,tiny_c   # one target per source
python train.py objective=sft                    # the baseline without fusion
python train.py experiments=fusechat_7b_v2 plan=true                            # what it would cost; nothing is run
python train.py -m teacher.workers=2 teacher.worker=0,1 hydra/launcher=joblib   # only the teachers, shared out
"""

import shlex
import sys
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from fusion.config.errors import UserError, raise_problems
from fusion.config.launch import Job, launch
from fusion.config.schema import ModelConfig, TrainConfig

if TYPE_CHECKING:
    from fusion.processes.starter import Node
    from fusion.tracking.record import RunRecord
    from fusion.tracking.rows import ComparisonRow
    from fusion.training.data import FusionDataModule
    from fusion.training.prepare import Prepared
    from fusion.training.target import Trained

SETTING = ("seed", "pivot", "world", "data", "optim", "trainer")
"""Targets and their SFT-only baseline have these in common."""
GROUP = (*SETTING, "template", "teacher", "alignment", "fusion", "objective")
"""Targets that differ in their source alone have these in common, and are merged together."""


def run(config: TrainConfig, job: Job) -> float | None:
    """One job: skip it when it is finished, else prepare, train, export, score and record.

    Returns what a search over settings minimises, where `search_value` asks for it.
    """
    from fusion.cache import code_version, fingerprint
    from fusion.processes.failures import Terminated
    from fusion.tracking.record import RunRecord, is_finished, read_result
    from fusion.training.nodes import this_node

    if config.plan:
        show_plan(config)
        return None
    is_worker = config.teacher.worker is not None
    if not is_worker:
        config = replace(config, teacher=replace(config.teacher, workers=1))  # who reads changes no target
    name = fingerprint({"settings": config.result_settings(), "code": code_version("fusion", "train")})
    if is_worker:  # never skipped: the cache knows what was read, and may be gone
        with RunRecord(job, "teaching", config.seed, name) as record:
            read_share(config, record)
        return None
    if config.skip_finished and is_finished(job.folder, name):
        print(f"{job.name}: finished before with the same settings; skip_finished=false runs it again")
        return read_result(job.folder).get("search_value")
    refuse_what_cannot_fit(config)
    node = this_node(config.parallel)
    if node.number > 0:
        assist(config, job, node)
        return None
    try:
        with RunRecord(job, "train", config.seed, name) as record:
            train(config, job, record, node)
    except Terminated as end:
        anew = [] if config.trainer.resume == "auto" else ["trainer.resume=auto"]
        more = shlex.join([*anew, f'hydra.run.dir="{job.folder}"'])
        print(f"{end}\nit goes on with: {job.command} {more}", file=sys.stderr)
        raise
    return read_result(job.folder).get("search_value")


def show_plan(config: TrainConfig) -> None:
    """What the job would need, and whether it is here; light, so that it answers at once."""
    from fusion.planning.stage1 import Stage1Plan
    from fusion.planning.text import verdict

    plan = Stage1Plan.of(config)
    print(f"{plan.text()}\n{verdict(plan.problems())}")


def refuse_what_cannot_fit(config: TrainConfig) -> None:
    """Raise UserError where weights and optimiser alone are too much for this machine; what is unknown may try."""
    from fusion.planning.stage1 import Stage1Plan

    if not config.estimate.check:
        return
    try:
        plan = Stage1Plan.of(config)
    except UserError:  # nothing is known of the shapes: loading will tell
        return
    raise_problems([f"{problem} (estimate.check=false tries it)" for problem in plan.sure_problems()])


def read_share(config: TrainConfig, record: "RunRecord") -> None:
    """One worker of the teacher pass: read its shards of every model, and stop."""
    import torch

    from fusion.training.prepare import prepare_share, sources
    from fusion.world.resolve import with_world

    torch.set_num_threads(config.threads)
    config, _ = with_world(config)
    record.lap("world")
    shares = prepare_share(config)
    record.lap("teaching")
    teacher = config.teacher
    for share in shares:
        state = f"finished: {share.store}" if share.store else "not finished, shards of other workers are missing"
        shards = f"{share.shards} of {share.all_shards} shards, {share.rows} rows"
        print(f"worker {teacher.worker} of {teacher.workers}: {share.name}: {shards}; the store is {state}")
    print("no training: this job is a worker (teacher.worker); when all have ended, run the command without it")
    result = {"worker": teacher.worker, "workers": teacher.workers, "shares": [asdict(share) for share in shares]}
    record.finish(result, {"pivot": config.pivot, "sources": sources(config), "data": config.data})


def assist(config: TrainConfig, job: Job, node: "Node") -> None:
    """One of several nodes, but not the first one: it trains along, and the first one records."""
    import torch

    from fusion.training.data import FusionDataModule
    from fusion.training.target import train_target
    from fusion.world.resolve import with_world

    torch.set_num_threads(config.threads)
    config, _ = with_world(config)
    data = FusionDataModule(config)
    data.setup()
    train_target(config, data, [], job.folder, "", node)
    print(f"node {node.number}: its part of the training is done; the first node has the model")


def train(config: TrainConfig, job: Job, record: "RunRecord", node: "Node") -> None:
    """The stage itself; the heavy libraries are loaded here, so that `--help` and skipped jobs answer at once."""
    import torch

    from fusion.tracking.loggers import job_loggers, log_scores
    from fusion.tracking.mirror import mirror_result
    from fusion.tracking.sweep import compare_folder
    from fusion.training.checkpoint_folder import discard_checkpoints
    from fusion.training.checkpoints import find_start
    from fusion.training.data import FusionDataModule
    from fusion.training.export import model_card
    from fusion.training.target import train_target
    from fusion.world.resolve import with_world

    torch.set_num_threads(config.threads)
    config, strong_skills = with_world(config)
    record.lap("world")
    data = FusionDataModule(config)
    data.setup()
    assert data.prepared is not None
    print_report(config, data.prepared)
    record.lap("prepare")
    start = find_start(data, job.folder)
    first_step = start.state.step if start else 0
    with job_loggers(config.logger, job, "train", config.tags, record.fingerprint, first_step) as loggers:
        card = model_card(f"{config.objective.name} {config.source.name}", config.pivot.path, CARD, job.command)
        trained = train_target(config, data, loggers, job.folder, card, node, start)
        write_heldout_won(job, data.prepared)
        record.lap("train")
        rows = score(config, job, strong_skills)
        if rows:
            log_scores(loggers, rows[-1].scores, rows[-1].nll_per_byte)
        record.lap("score")
        result = result_of(config, data, trained, rows, search_value(config, job, data.prepared))
        origin = lineage(config, data.prepared, strong_skills)
        mirror_result(loggers, "train", job.folder, result, origin)
    record.finish(result, origin)
    discard_checkpoints(job.folder)
    if job.sweep is None:
        compare_folder(job.folder, job.command)


CARD = (
    "A copy of the pivot, trained by Fusion on dialogues with the pivot's and the source's fused next-token "
    "distributions (or, for SFT, on the references alone)."
)


def result_of(
    config: TrainConfig,
    data: "FusionDataModule",
    trained: "Trained",
    rows: "list[ComparisonRow]",
    value: float | None,
) -> dict[str, object]:
    """What `result.json` says of a finished training."""
    assert data.prepared is not None
    tokens = data.tokens_trained(trained.steps)
    return {
        "name": config.source.name,
        "objective": config.objective.name,
        "is_baseline": config.is_baseline,
        "group": config.common(GROUP),
        "setting": config.common(SETTING),
        "recipe": config.recipe(),
        "search_value": value,
        "model": "model",
        "steps": trained.steps,
        "tokens": tokens,
        "tokens_per_second": round(tokens / trained.seconds, 1),
        "metrics": trained.metrics,
        "report": data.prepared.report,
        "comparison": [row.to_json() for row in rows],
    }


def print_report(config: TrainConfig, prepared: "Prepared") -> None:
    """How the sources were aligned and who teaches how much, before the training starts."""
    from fusion.tracking.terminal import print_stage1

    print_stage1(prepared.report, config.alignment, config.fusion.name)


def write_heldout_won(job: Job, prepared: "Prepared") -> None:
    """Held-out dialogues that a source won: what `merge.scale=search` reads."""
    from fusion.dialogues.dialogue import write_jsonl

    write_jsonl(job.folder / "heldout_won.jsonl", prepared.heldout_won)


def score(config: TrainConfig, job: Job, strong_skills: dict[str, list[str]]) -> "list[ComparisonRow]":
    """Rows of pivot, sources and the new target (last); nothing for evaluation=none."""
    from fusion.evaluation.compare import ScoredModel, score_models
    from fusion.training.prepare import sources

    if config.evaluation.name == "none":
        return []
    sft = config.is_baseline
    target = ModelConfig(name="sft" if sft else config.source.name, path=str(job.folder / "model"))
    strong = [skill for source in sources(config) for skill in strong_skills.get(source.name, [])]
    models = [ScoredModel("pivot", config.pivot)]
    models += [
        ScoredModel("source", source, tuple(strong_skills.get(source.name, [])))
        for source in sources(config)
        if not sft
    ]
    models.append(ScoredModel("sft" if sft else "target", target, () if sft else tuple(strong), config.recipe()))
    return score_models(models, config.data, config.evaluation, config.paths, config.seed, job.command)


def search_value(config: TrainConfig, job: Job, prepared: "Prepared") -> float | None:
    """Cross-entropy of the target on held-out dialogues that a source won, in nats per byte."""
    from fusion.evaluation.search import folder_loss

    if config.search_value is None:
        return None
    if not prepared.heldout_won:
        raise UserError(f"search_value={config.search_value}: there are no held-out dialogues that a source won")
    target = replace(config.pivot, path=str(job.folder / "model"))
    return folder_loss(target, prepared.heldout_won, config.data.max_length, config.evaluation.batch_tokens)


def lineage(config: TrainConfig, prepared: "Prepared", strong_skills: dict[str, list[str]]) -> dict[str, object]:
    """What the target was made of: models and dialogues with their hashes."""
    from fusion.training.prepare import sources

    return {
        "pivot": config.pivot,
        "sources": [] if config.is_baseline else sources(config),
        "data": config.data,
        "strong_skills": strong_skills,
        "inputs": prepared.inputs,
        "distributions": prepared.fused.folder.name,
    }


def main() -> None:
    """Console entry point `fusion-train`."""
    launch("train", run)


if __name__ == "__main__":
    main()
