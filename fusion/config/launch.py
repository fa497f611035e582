"""From a command line to a job: checked, composed by Hydra, and handed over as typed settings."""

import os
import shlex
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
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

from fusion.config.check import command_line_problems
from fusion.config.compose import CONFIG_FOLDER, SCHEMAS, register, to_settings
from fusion.config.errors import EXIT_USER_ERROR, UserError, raise_problems
from fusion.config.files import missing_files
from fusion.config.help import help_text
from fusion.config.origins import with_origins
from fusion.config.rules import settings_problems

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


def launch(entry: str, run: Callable[[Any, Job], None], run_together: Callable[[Jobs], None] | None = None) -> None:
    """Run `run(settings, job)`, once or once per job of a sweep; exit with 2 on the user's mistakes.

    Jobs of a sweep with `sweep=fused` wait until Hydra has composed them all; then `run_together` gets them.
    """
    if HELP_FLAGS & set(sys.argv[1:]):
        print(help_text(entry))
        return
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra then hands errors to us instead of printing them
    register()
    failures: list[str] = []
    waiting: Jobs = []
    starter = os.getpid()

    def run_or_wait(settings: Any, job: Job) -> None:
        if run_together is None or job.sweep is None or settings.sweep != "fused":
            run(settings, job)
        elif os.getpid() != starter:
            raise UserError(
                "sweep=fused: jobs in processes of their own cannot share a pass; leave hydra/launcher out"
            )
        else:
            waiting.append((settings, job))

    try:
        if not UNCHECKED_FLAGS & set(sys.argv[1:]):
            raise_problems(command_line_problems(entry, sys.argv[1:]))
        hydra.main(version_base="1.3", config_path=str(CONFIG_FOLDER), config_name=entry)(
            lambda config: _run(entry, run_or_wait, config, failures, starter)
        )()
        if run_together is not None and waiting:
            _together(run_together, waiting, failures)
    except UserError as error:
        _complain(error.problems)
    except (HydraException, OmegaConfBaseException) as error:
        _complain(str(error).splitlines()[:1])
    if failures:
        _complain(failures)


def _run(entry: str, run: Callable[[Any, Job], None], config: DictConfig, failures: list[str], starter: int) -> None:
    """One job. In a sweep the user's mistakes in one job do not stop the others; they are told at the end."""
    job = _job(entry, config)
    try:
        settings = to_settings(config, SCHEMAS[entry])
        raise_problems(_problems(entry, settings))
        run(settings, job)
        if getattr(settings, "plan", False):
            _forget(job.folder)
    except UserError as error:
        if job.sweep is None:
            _complain(error.problems)
        problems = [f"{job.name}: {problem}" for problem in error.problems]
        if os.getpid() != starter:  # a launcher with processes of its own: only Hydra brings errors back
            raise UserError(problems) from error
        failures += problems


def _together(run_together: Callable[[Jobs], None], jobs: Jobs, failures: list[str]) -> None:
    try:
        run_together(jobs)
    except UserError as error:
        failures += error.problems


def _problems(entry: str, settings: Any) -> list[str]:
    """What types cannot say, each with the file and line that set it where the command line did not."""
    found = [*settings_problems(settings), *missing_files(settings)]
    if not found:
        return []
    overrides = list(HydraConfig.get().overrides.task)
    given = {override.lstrip("+~").partition("=")[0] for override in overrides}
    loader = GlobalHydra.instance().config_loader()
    assert isinstance(loader, ConfigLoaderImpl)
    return with_origins(found, loader, entry, overrides, given)


def _forget(folder: Path) -> None:
    """Take back the folder that Hydra has made for a job of which nothing was run."""
    shutil.rmtree(folder / ".hydra", ignore_errors=True)
    for log in folder.glob("*.log"):
        if not log.stat().st_size:
            log.unlink()
    with suppress(OSError):  # it holds something of an earlier job, or of others
        for one in (folder, folder.parent):
            one.rmdir()


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
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    print(f"{count}:", *(f"  - {problem}" for problem in problems), sep="\n", file=sys.stderr)
    sys.exit(EXIT_USER_ERROR)
