"""One merge, or a sweep in one pass, in a process of its own: `python merge_once.py RECIPE.json OUT`.

`RECIPE.json` holds method, base, targets, engine and parameters (of a sweep: `sweep`, a list of them). A merge of a
few numbers comes first, so that the compiled loops are loaded, as they are behind the first merge of a sweep; the
seconds do not count it. The last line is the report of the first merge, with the seconds of the processors.
"""

import json
import sys
import time
from pathlib import Path

import torch

from fusion.config.schema import EngineConfig
from fusion.merging import MergeRequest, merge_folders_together, merge_state_dicts


def main(recipe: str, out: str) -> None:
    given = json.loads(Path(recipe).read_text("utf-8"))
    method, targets = given["method"], [Path(target) for target in given["targets"]]
    requests = [MergeRequest(method, parameters) for parameters in given["sweep"] or [given["parameters"]]]
    numbers = [{"w": torch.arange(8, dtype=torch.bfloat16) * j} for j in range(len(targets) + 1)]
    merge_state_dicts(method, numbers[0], numbers[1:], **requests[0].parameters)
    outs = [Path(out) / str(place) for place in range(len(requests))] if given["sweep"] else [Path(out)]
    engine = EngineConfig(**given["engine"])
    started = time.process_time()
    reports = merge_folders_together(requests, Path(given["base"]), targets, outs, engine=engine)
    print(json.dumps(reports[0].to_dict() | {"processor_seconds": time.process_time() - started}))


if __name__ == "__main__":
    main(*sys.argv[1:])
