"""Make a comparison page of any runs: `python -m fusion.tracking.compare DIR [DIR ...] [--out FOLDER]`."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from fusion.config import EXIT_USER_ERROR, UserError
from fusion.tracking.comparison import read_runs, read_traces, write_comparison
from fusion.tracking.rows import RESULT_FILE
from fusion.tracking.terminal import print_table


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, write the page, return the exit status: 2 where the folders hold nothing to compare."""
    parser = argparse.ArgumentParser(
        prog="python -m fusion.tracking.compare", description="Compare any runs on one page."
    )
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="DIR", help="a job's folder, or any folder above jobs"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to write (default: the first DIR)")
    parser.add_argument("--title", default="Comparison of runs", help="heading of the page")
    options = parser.parse_args(arguments)
    try:
        compare(options.folders, options.out or options.folders[0], options.title)
    except UserError as error:
        print(*error.problems, sep="\n", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


def compare(folders: Sequence[Path], out: Path, title: str) -> list[Path]:
    """Compare the runs below `folders` in `out`; return the files written. Raises `UserError` if there is no row."""
    problems = [f"{folder}: no such folder; name a folder with runs" for folder in folders if not folder.is_dir()]
    if problems:
        raise UserError(problems)
    rows, failures = read_runs(folders)
    if not rows:
        problems = [f"{failure.job}: {failure.status}, {failure.reason}" for failure in failures]
        named = ", ".join(map(str, folders))
        raise UserError([*problems, f"{named}: no finished job with scores ({RESULT_FILE} with 'comparison' rows)"])
    command = shlex.join(["python", "-m", "fusion.tracking.compare", *map(str, folders), "--out", str(out)])
    traces = read_traces(folders, rows)
    paths = write_comparison(out, rows, title=title, command=command, failures=failures, traces=traces)
    print_table(rows)
    for failure in failures:
        print(f"no scores from {failure.job}: {failure.status}, {failure.reason}")
    print("page: " + str(next(path for path in paths if path.suffix == ".html")))
    return paths


if __name__ == "__main__":
    sys.exit(main())
