"""The house rules that a reader relies on: imports run downwards, importing is light, files stay short."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
FLOORS = (
    {"train", "merge", "evaluate"},
    {"chat"},
    {"evaluation"},
    {"tracking"},
    {"training", "merging"},
    {"objective"},
    {"alignment"},
    {"teaching", "world"},
    {"dialogues"},
    {"processes", "planning"},
    {"config"},
    {"cache"},
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
SOURCES = [
    *sorted((REPOSITORY / "fusion").rglob("*.py")),
    REPOSITORY / "train.py",
    REPOSITORY / "merge.py",
    REPOSITORY / "evaluate.py",
]
HEAVY = {"torch", "transformers", "pytorch_lightning", "wandb", "datasets", "numba", "scipy", "pandas"}
LONGEST_FILE, LONGEST_FUNCTION = 400, 60


def room_of(path):
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return parts[1] if parts[0] == "fusion" and len(parts) > 1 else parts[0]


def imported_rooms(path):
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names = [node.module] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            if name and name.startswith("fusion."):
                yield name.split(".")[1]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_imports_run_downwards(path):
    room = room_of(path)
    for imported in imported_rooms(path):
        assert imported == room or FLOOR_OF[imported] > FLOOR_OF.get(room, -1), f"{room} must not import {imported}"


def test_files_and_functions_are_short():
    for path in SOURCES:
        text = path.read_text("utf-8")
        assert text.count("\n") <= LONGEST_FILE, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < LONGEST_FUNCTION, f"{path}: {node.name}"


@pytest.mark.parametrize(
    "module", ["fusion", "fusion.config.launch", "fusion.cache", "fusion.merging", "fusion.merging.verify"]
)
def test_importing_is_light(module):
    code = f"import sys, {module}; assert not {{'torch', 'transformers'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--cfg", "job"], ["experiments=fusechat_7b_v1", "plan=true"]], ids=" ".join
)
def test_what_runs_nothing_loads_nothing_heavy(arguments, tmp_path):
    """These answer at once because the libraries of the stages stay out."""
    code = f"""
import sys
sys.argv = ["train.py", *{arguments!r}]
sys.path.insert(0, {str(REPOSITORY)!r})
import train
try:
    train.main()
finally:
    found = {HEAVY!r} & set(sys.modules)
    print("heavy:", sorted(found), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert "heavy: []" in done.stderr, done.stderr
    assert len(done.stdout.splitlines()) > 10
