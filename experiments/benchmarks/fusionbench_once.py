"""One merge by FusionBench (https://github.com/tanganke/fusion_bench), in a Python of its own.

`python fusionbench_once.py RECIPE.json OUT`: models are loaded, merged in memory and saved; the last line has the
seconds of all that, and those of the processors.
"""

import json
import sys
import time
from pathlib import Path

import torch
from fusion_bench import BaseModelPool
from fusion_bench.method import SimpleAverageAlgorithm, TaskArithmeticAlgorithm, TiesMergingAlgorithm
from transformers import AutoModelForCausalLM

ALGORITHMS = {
    "linear": lambda given: SimpleAverageAlgorithm(),
    "task_arithmetic": lambda given: TaskArithmeticAlgorithm(scaling_factor=given["weight"]),
    "ties": lambda given: TiesMergingAlgorithm(
        scaling_factor=1.0, threshold=100 * given["density"], remove_keys=[], merge_func="mean"
    ),
}


def main(recipe: str, out: str) -> None:
    given = json.loads(Path(recipe).read_text("utf-8"))
    torch.set_num_threads(given["engine"]["threads"])
    started = time.perf_counter(), time.process_time()
    folders = {"_pretrained_": given["base"]} | {f"target{j}": path for j, path in enumerate(given["targets"])}
    models = {name: AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16) for name, path in folders.items()}
    merged = ALGORITHMS[given["method"]](given["parameters"]).run(BaseModelPool(models))
    merged.save_pretrained(out)
    seconds, processor_seconds = time.perf_counter() - started[0], time.process_time() - started[1]
    print(json.dumps({"seconds": seconds, "processor_seconds": processor_seconds}))


if __name__ == "__main__":
    main(*sys.argv[1:])
