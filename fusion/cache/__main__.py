"""The cache on the command line: `python -m fusion.cache` lists it, `python -m fusion.cache prune` makes room.

Nothing is deleted without --yes, and nothing that a job refers to without --used. Jobs leave notes of what they use;
those below --runs also count by their records.
"""

import argparse
import sys
from pathlib import Path

from fusion.cache.manager import Stage, prunable, prune, stages

RUNS = Path("runs")
SHOWN_USERS = 2
UNITS = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))


def main(words: list[str] | None = None) -> int:
    options = _parser().parse_args(words)
    runs = [RUNS] * RUNS.is_dir() if options.runs is None else options.runs
    problems = _problems(options, runs)
    found = [] if problems else stages(options.cache, runs)
    problems = problems or _kind_problems(options.stage, found)
    if problems:
        print(*problems, sep="\n", file=sys.stderr)
        return 2
    if options.action == "list":
        _print(found)
        return 0
    chosen = prunable(found, older_than_days=options.older_than, kinds=options.stage, used_too=options.used)
    _print(chosen)
    kept = sum(1 for stage in found if stage.users and not options.used)
    print(
        f"kept because jobs refer to them: {kept} (--used takes them too)" if kept else "no job refers to any of them"
    )
    if not options.yes:
        print("nothing is deleted without --yes")
        return 0
    gone = [stage for stage in chosen if prune(stage)]
    print(f"deleted {len(gone)} folders, {_size(sum(stage.num_bytes for stage in gone))}")
    for stage in chosen:
        if stage not in gone:
            print(f"left, since somebody builds it: {stage.kind}/{stage.name}")
    return 0


def _problems(options: argparse.Namespace, runs: list[Path]) -> list[str]:
    """Folders that are not there: who mistypes --runs would lose what the jobs in it refer to."""
    problems = [] if options.cache.is_dir() else [f"{options.cache}: no such folder; name the cache: --cache FOLDER"]
    problems += [f"{one}: no such folder; name folders with jobs: --runs FOLDER" for one in runs if not one.is_dir()]
    if not options.older_than >= 0:
        problems.append(f"--older-than {options.older_than:g}: days from 0 on are expected")
    return problems


def _kind_problems(wanted: list[str], found: list[Stage]) -> list[str]:
    known = sorted({stage.kind for stage in found})
    return [
        f"--stage {kind}: there is none in this cache; it has {', '.join(known) or 'nothing'}"
        for kind in wanted
        if kind not in known
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fusion.cache", description=__doc__)
    parser.add_argument("action", nargs="?", choices=("list", "prune"), default="list")
    parser.add_argument("--cache", type=Path, default=Path("cache"), help="folder of the cache (paths.cache)")
    parser.add_argument("--runs", type=Path, nargs="*", help="folders with jobs (paths.runs); left out: runs")
    parser.add_argument("--stage", nargs="*", default=[], help="prune: only these kinds, such as teaching or scores")
    parser.add_argument("--older-than", type=float, default=0.0, metavar="DAYS", help="prune: only what is as old")
    parser.add_argument("--used", action="store_true", help="prune: also what jobs refer to; they make it again")
    parser.add_argument("--yes", action="store_true", help="prune: really delete")
    return parser


def _print(found: list[Stage]) -> None:
    rows = [("stage", "size", "age", "used by")]
    rows += [(_name(stage), _size(stage.num_bytes), f"{stage.age_days:.1f} d", _users(stage)) for stage in found]
    widths = [max(len(row[place]) for row in rows) for place in range(3)]
    for row in rows:
        print(f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]}".rstrip())
    print(f"{len(found)} folders, {_size(sum(stage.num_bytes for stage in found))}")


def _name(stage: Stage) -> str:
    return f"{stage.kind}/{stage.name}" + ("" if stage.is_finished else " (unfinished)")


def _users(stage: Stage) -> str:
    shown = ", ".join(map(str, stage.users[:SHOWN_USERS]))
    more = len(stage.users) - SHOWN_USERS
    return f"{shown} and {more} more" if more > 0 else shown or "-"


def _size(num_bytes: float) -> str:
    for unit, name in UNITS:
        if num_bytes >= unit:
            return f"{num_bytes / unit:.1f} {name}"
    return f"{num_bytes:.0f} B"


if __name__ == "__main__":
    sys.exit(main())
