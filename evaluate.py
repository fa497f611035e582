"""Scores of any models, and which differences between them are more than noise.

python evaluate.py                                                       # all models of the newest run
python evaluate.py runs=[runs/merge]                                     # of several runs, over their seeds
python evaluate.py runs=[runs/merge] only=[pivot,sft,best_target,merged] pairs=next    # a chain of planned comparisons
python evaluate.py models=[/models/pivot,/models/fused] scorers=[mt_bench] judge=openai
"""

from dataclasses import asdict

from fusion.config.evaluate import EvaluateConfig
from fusion.config.launch import Job, launch


def run(config: EvaluateConfig, job: Job) -> None:
    """One job: score every model, compare them, record all; the heavy libraries are loaded here."""
    import torch

    from fusion.cache import code_version, fingerprint
    from fusion.evaluation.entries import find_entries
    from fusion.evaluation.output import write_evaluation
    from fusion.evaluation.run import Workshop, evaluate
    from fusion.tracking.record import RunRecord

    torch.set_num_threads(config.threads)
    name = fingerprint({"settings": config, "code": code_version("fusion", "evaluate")})
    with RunRecord(job, "evaluate", config.seed, name) as record:
        shop = Workshop.of(config)
        entries = find_entries(config)
        record.lap("models")
        scorers = evaluate(config, entries, shop, lambda line: print(line, flush=True))
        record.lap("score")
        pages = write_evaluation(job.folder, scorers, config.pairs)
        print(pages[0].read_text("utf-8"))
        spent = shop.judge.ledger.to_json(config.judge) if shop.judge else None
        result = {"scores": "scores.json", "items": "items.jsonl", "judge": spent}
        record.finish(
            result, {"models": {entry.name: [asdict(one) for one in entry.repetitions] for entry in entries}}
        )
    if spent:
        print(f"judge: {spent['asked']} asked, {spent['from_cache']} from the cache, ${spent['dollars']:.2f}")
    print("evaluation: " + "  ".join(map(str, pages)))


def main() -> None:
    """Console entry point `fusion-evaluate`."""
    launch("evaluate", run)


if __name__ == "__main__":
    main()
