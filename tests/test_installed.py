"""As an installed package, from any folder: the files of `conf/` travel along, and the shell completes words."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCES = (
    "fusion",
    "conf",
    "experiments",
    "train.py",
    "merge.py",
    "setup.py",
    "pyproject.toml",
    "README.md",
    "LICENSE",
)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with what `pip install` puts into site-packages, built as pip builds it."""
    root = tmp_path_factory.mktemp("wheel")
    source = root / "source"
    source.mkdir()
    for name in SOURCES:
        if (REPOSITORY / name).is_dir():  # without what other processes are just compiling
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(REPOSITORY / name, source / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy(REPOSITORY / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(root), "."]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (wheel,) = root.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(root / "site")
    return root / "site"


def call(site, cwd, entry, *words):
    """Run a console script of the installed package; returns its output."""
    code = f"import sys; sys.argv = ['fusion-{entry}', *sys.argv[1:]]; import {entry}; {entry}.main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(site), "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_installed_commands_compose_recipes_and_studies(installed, tmp_path):
    assert (installed / "fusion" / "conf" / "train.yaml").is_file()
    scripts = next(installed.glob("*.dist-info")) / "entry_points.txt"
    assert "fusion-train = train:main" in scripts.read_text()
    assert "fusion-merge = merge:main" in scripts.read_text()
    composed = call(installed, tmp_path, "train", "experiments=fusechat_7b_v2", "--cfg", "job")
    assert "name: openchat_3_5_7b" in composed
    assert "tau: 0.1" in call(installed, tmp_path, "merge", "experiments=fusechat_7b_v2_merge", "--cfg", "job")
    assert "keep_pivot_won: 0.25" in call(installed, tmp_path, "train", "experiments=replay_quarter", "--cfg", "job")
    assert "qwen3_0_6b" in call(installed, tmp_path, "train", "--help")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("python train.py optim=p", {"optim=paper"}),
        ("python train.py optim.weight", {"optim.weight_decay="}),
        ("python train.py pivot=qwen", {"pivot=qwen3_0_6b", "pivot=qwen3_4b"}),
    ],
)
def test_the_shell_completes_words(line, expected, tmp_path):
    environment = os.environ | {"COMP_LINE": line, "COMP_POINT": str(len(line))}
    command = [sys.executable, str(REPOSITORY / "train.py"), "-sc", "query=bash"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == expected
