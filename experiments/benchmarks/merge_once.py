"""One merge in a process of its own: `python merge_once.py RECIPE.json OUT`. Prints its report as the last line.

`RECIPE.json` holds method, base, targets, engine and parameters. A merge of a few numbers comes first, so that the
compiled loops are loaded, as they are behind the first merge of a sweep; the report's seconds do not count it.
"""

import json
import sys
import time
from pathlib import Path

import torch

from fusion.config.schema import EngineConfig
from fusion.merging import merge_folders, merge_state_dicts


def main(recipe: str, out: str) -> None:
    given = json.loads(Path(recipe).read_text("utf-8"))
    method, parameters, targets = given["method"], given["parameters"], [Path(target) for target in given["targets"]]
    numbers = [{"w": torch.arange(8, dtype=torch.bfloat16) * j} for j in range(len(targets) + 1)]
    merge_state_dicts(method, numbers[0], numbers[1:], **parameters)
    engine = EngineConfig(**given["engine"])
    started = time.process_time()
    report = merge_folders(method, Path(given["base"]), targets, Path(out), engine=engine, **parameters)
    print(json.dumps(report.to_dict() | {"processor_seconds": time.process_time() - started}))


if __name__ == "__main__":
    main(*sys.argv[1:])
