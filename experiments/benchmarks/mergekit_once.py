"""One merge by mergekit, in a Python of its own: `python mergekit_once.py RECIPE.json OUT`.

Prints the seconds of the merge itself, without imports, and those of the processors, as the last line.
"""

import json
import sys
import time
from pathlib import Path

from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge


def main(recipe: str, out: str) -> None:
    config = MergeConfiguration.model_validate(json.loads(Path(recipe).read_text("utf-8")))
    options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True, async_write=True, write_threads=2)
    started = time.perf_counter(), time.process_time()
    run_merge(config, out, options)
    seconds, processor_seconds = time.perf_counter() - started[0], time.process_time() - started[1]
    print(json.dumps({"seconds": seconds, "processor_seconds": processor_seconds}))


if __name__ == "__main__":
    main(*sys.argv[1:])
