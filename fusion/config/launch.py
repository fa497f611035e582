"""From a command line to a job: checked, composed by Hydra, and handed over as typed settings."""

import errno
import os
import shlex
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fusion.cache import keep_digests
from fusion.config.check import More, command_line_problems, sweep_problems
from fusion.config.compose import CONFIG_FOLDER, SCHEMAS, register, to_settings
from fusion.config.errors import EXIT_USER_ERROR, UserError, raise_problems
from fusion.config.files import missing_files
from fusion.config.help import help_text
from fusion.config.origins import with_origins
from fusion.config.rules import settings_problems

CANCEL = "CANCEL"
DISK_ERRORS = {errno.EACCES, errno.EEXIST, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOSPC, errno.EDQUOT}
HELP_FLAGS = {"--help", "-h"}
UNCHECKED_FLAGS = {"--hydra-help", "--version", "--shell-completion", "-sc"}


@dataclass(frozen=True)
class Job:
    """One job of a command: a single run, or one point of a sweep."""

    folder: Path
    """Where everything about the job is written."""
    name: str
    """Readable and unique in its sweep."""
    command: str
    """The line that runs exactly this job again."""
    config_yaml: str
    """The whole resolved config."""
    sweep: Path | None
    """Folder of the sweep that the job belongs to."""


Jobs = list[tuple[Any, Job]]
"""Settings of jobs, and the jobs."""


def launch(
    entry: str,
    run: Callable[[Any, Job], Any],
    run_together: Callable[[Jobs], None] | None = None,
    more: More = lambda settings: [],
) -> None:
    """Run `run(settings, job)`, once or once per job of a sweep; exit with 2 on the user's mistakes.

    Jobs of a sweep with `sweep=fused` wait until Hydra has composed them all; then `run_together` gets them. `more`
    finds mistakes that only the entry point knows of, to be told with the others.
    """
    if HELP_FLAGS & set(sys.argv[1:]):
        print(help_text(entry))
        return
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra then hands errors to us instead of printing them
    register()
    failures = Failures()
    waiting: Jobs = []
    starter = os.getpid()

    def run_or_wait(settings: Any, job: Job) -> Any:
        if run_together is None or job.sweep is None or settings.sweep != "fused":
            return run(settings, job)
        if os.getpid() != starter:
            raise UserError("sweep=fused: jobs in processes of their own cannot share a pass; leave launcher out")
        if settings.search_value is not None:
            raise UserError("sweep=fused: a search waits for the value of every job; leave sweep=fused out")
        waiting.append((settings, job))
        return None

    try:
        if not UNCHECKED_FLAGS & set(sys.argv[1:]):
            raise_problems(command_line_problems(entry, sys.argv[1:], more))
        with _disk_errors():
            hydra.main(version_base="1.3", config_path=str(CONFIG_FOLDER), config_name=entry)(
                lambda config: _run(entry, run_or_wait, config, failures, starter, more)
            )()
        if run_together is not None and waiting:
            _together(run_together, waiting, failures)
    except UserError as error:
        _complain(error.problems)
    except (HydraException, OmegaConfBaseException) as error:
        _complain(_by_option(entry) or str(error).splitlines()[:1])
    except ValueError:  # Optuna finds no best job where all have failed, for reasons that are told below
        if not failures.problems:
            raise
    if failures.problems:
        _tell(failures.problems)
        if failures.again:
            print("run again alone (the same sweep again runs only these, too):", file=sys.stderr)
            print(*(f"  {command}" for command in failures.again), sep="\n", file=sys.stderr)
        sys.exit(1 if failures.is_ours else EXIT_USER_ERROR)


def _by_option(entry: str) -> list[str]:
    """What Hydra's complaint about a job of a sweep means, where it is about one option of a group."""
    GlobalHydra.instance().clear()
    try:
        return sweep_problems(entry, sys.argv[1:])
    except HydraException:
        return []


@dataclass
class Failures:
    """Jobs of a sweep that failed in this process: told at the end, with the commands that run them alone."""

    problems: list[str] = field(default_factory=list)
    again: list[str] = field(default_factory=list)
    is_ours: bool = False
    """One of them was no mistake of the user's."""

    def add(self, job: Job, problems: Sequence[str], is_plan: bool = False) -> None:
        self.problems += [f"{job.name}: {problem}" for problem in problems]
        if is_plan:  # of which nothing was run
            return
        folder = shlex.quote(f'hydra.run.dir="{job.folder}"')
        self.again.append(f"{job.command} {folder}")


def _run(
    entry: str, run: Callable[[Any, Job], Any], config: DictConfig, failures: Failures, starter: int, more: More
) -> Any:
    """One job; returns what a search minimises. In a sweep a job that fails does not stop the others."""
    job = _job(entry, config)
    if file := cancelled(job, config.get("tags", []), Path(config.paths.runs)):
        print(f"{job.name}: not run, cancelled by {file}")
        return None
    is_plan = bool(config.get("plan"))
    try:
        settings = to_settings(config, SCHEMAS[entry])
        raise_problems(_problems(entry, settings, more))
        keep_digests(Path(settings.paths.cache))
        with _disk_errors():
            return run(settings, job)
    except UserError as error:
        if job.sweep is None:
            _complain(error.problems)
        if os.getpid() != starter:  # a launcher with processes of its own: only Hydra brings errors back
            raise UserError([f"{job.name}: {problem}" for problem in error.problems]) from error
        failures.add(job, error.problems, is_plan)
    except Exception as error:
        if job.sweep is None or os.getpid() != starter:
            raise
        traceback.print_exc()
        failures.add(job, [f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"])
        failures.is_ours = True
    finally:
        if is_plan:
            _forget(job)
    return None


@contextmanager
def _disk_errors() -> Iterator[None]:
    """What cannot be written or read, and a full disk: no bug of ours, so it is told without a traceback."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        where = f"{error.filename}: " if error.filename else ""
        places = "hydra.run.dir, hydra.sweep.dir, paths.runs, paths.cache"
        raise UserError(f"{where}{error.strerror}; name folders that can be written: {places}") from error


def cancelled(job: Job, tags: Sequence[str], runs: Path) -> Path | None:
    """The file that cancels a job of a sweep before it begins, if there is one.

    `CANCEL` in the folder of the sweep or of all runs names tags or jobs (`*` stands for anything), one per line; an
    empty one cancels all.
    """
    for folder in (job.sweep, runs) if job.sweep else ():
        file = folder / CANCEL
        if file.is_file():
            words = file.read_text("utf-8").split()
            if not words or any(fnmatch(name, word) for word in words for name in (job.name, *tags)):
                return file
    return None


def _together(run_together: Callable[[Jobs], None], jobs: Jobs, failures: Failures) -> None:
    try:
        run_together(jobs)
    except UserError as error:
        failures.problems += error.problems


def _problems(entry: str, settings: Any, more: More) -> list[str]:
    """What types cannot say, each with the file and line that set it where the command line did not."""
    found = [*settings_problems(settings), *missing_files(settings)]
    if not found:
        return []
    found += more(settings)
    overrides = list(HydraConfig.get().overrides.task)
    given = {override.lstrip("+~").partition("=")[0] for override in overrides}
    loader = GlobalHydra.instance().config_loader()
    assert isinstance(loader, ConfigLoaderImpl)
    return with_origins(found, loader, entry, overrides, given)


def _forget(job: Job) -> None:
    """Take back what Hydra has made for a job of which nothing was run, but nothing of an earlier job's."""
    if {path.name for path in job.folder.iterdir()} <= {".hydra", f"{HydraConfig.get().job.name}.log"}:
        shutil.rmtree(job.folder)
    sweep = job.sweep
    if sweep and {path.name for path in sweep.iterdir()} <= {"multirun.yaml"}:
        shutil.rmtree(sweep)
    with suppress(OSError):  # there are other jobs
        (sweep or job.folder).parent.rmdir()


def _job(entry: str, config: DictConfig) -> Job:
    hydra_config = HydraConfig.get()
    overrides = list(hydra_config.overrides.task)
    folder = Path(hydra_config.runtime.output_dir)
    return Job(
        folder=folder,
        name=folder.name,
        command=shlex.join(["python", f"{entry}.py", *_own_config_folders(hydra_config), *overrides]),
        config_yaml=OmegaConf.to_yaml(config, resolve=True),
        sweep=folder.parent if hydra_config.mode == RunMode.MULTIRUN else None,
    )


def _own_config_folders(hydra_config: Any) -> list[str]:
    """The user's own config folder as the option that names it: without it the command would not compose."""
    sources = hydra_config.runtime.config_sources
    return [word for one in sources if one.provider == "command-line" for word in ("--config-dir", one.path)]


def _complain(problems: list[str]) -> NoReturn:
    _tell(problems)
    sys.exit(EXIT_USER_ERROR)


def _tell(problems: list[str]) -> None:
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    print(f"{count}:", *(f"  - {problem}" for problem in problems), sep="\n", file=sys.stderr)
