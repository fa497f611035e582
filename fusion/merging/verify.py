"""`python -m fusion.merging.verify RUN_DIR`: are the inputs and outputs of a merge still what they were?"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fusion.config import EXIT_USER_ERROR, UserError
from fusion.merging.checkpoints.manifest import differences, find_manifest


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what changed; exit code 0 when nothing did, else 2."""
    parser = argparse.ArgumentParser(prog="python -m fusion.merging.verify", description=__doc__)
    parser.add_argument(
        "folder", type=Path, metavar="RUN_DIR", help="a merged model, or a run that holds it in model/"
    )
    parser.add_argument(
        "--outputs-only", action="store_true", help="do not ask for the inputs, e.g. on another machine"
    )
    options = parser.parse_args(arguments)
    try:
        path = find_manifest(options.folder)
        num_files, problems = differences(path, check_inputs=not options.outputs_only)
    except UserError as error:
        problems = error.problems
    if problems:
        print("\n".join(problems), file=sys.stderr)
        return EXIT_USER_ERROR
    print(f"{path}: all {num_files} files are unchanged")
    return 0


if __name__ == "__main__":
    sys.exit(main())
