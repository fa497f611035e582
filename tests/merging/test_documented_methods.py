"""docs/merge_methods.md: its list is complete, and its own method works from outside the package."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from merge_inputs import make_family, save_model
from safetensors.torch import load_file

from fusion.merging import check_parameters, merge_state_dicts, method_names

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "merge_methods.md").read_text("utf-8")


def block_of(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.S)
    return found


def test_the_list_is_complete() -> None:
    table = PAGE.split("| methods |")[1].split("\n\n")[0]
    named = re.findall(r"`(\w+)`", table)
    assert sorted(named) == method_names()


def test_a_method_from_outside_takes_ten_lines_and_merges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = block_of("python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    (tmp_path / "my_merges.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    base, targets = make_family(2)
    merged = merge_state_dicts("my_merges.loudest", base, targets)
    for name in base:
        loudest = max((target[name] - base[name] for target in targets), key=torch.linalg.vector_norm)
        assert torch.equal(merged[name], base[name] + loudest)
    (problem,) = check_parameters("my_merges.loudest", {"others": 2})
    assert "others must be a number from 0 to 1, got 2" in problem


def test_the_documented_command_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_merges.py").write_text(block_of("python"))
    (tmp_path / "my_conf" / "merge").mkdir(parents=True)
    (tmp_path / "my_conf" / "merge" / "loudest.yaml").write_text(block_of("yaml"))
    base, targets = make_family(2, torch.bfloat16)
    folders = [save_model(tmp_path / f"model{place}", state) for place, state in enumerate([base, *targets])]
    command = [sys.executable, str(ROOT / "merge.py"), "--config-dir", "my_conf", "merge=loudest", "evaluation=none"]
    command += [f"base={folders[0]}", f"targets=[{folders[1]},{folders[2]}]", "hydra.run.dir=run"]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": "."}, capture_output=True, text=True, timeout=3600
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    merged = load_file(tmp_path / "run" / "model" / "model.safetensors")
    expected = merge_state_dicts("my_merges.loudest", base, targets)
    assert all(torch.equal(merged[name], expected[name]) for name in expected)
