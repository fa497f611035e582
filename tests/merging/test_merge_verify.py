"""`python -m fusion.merging.verify`."""

import subprocess
import sys
from pathlib import Path

import pytest

from fusion.config.schema import EngineConfig
from fusion.merging import merge_folders
from fusion.merging.verify import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(family: tuple[Path, list[Path]], tmp_path: Path) -> Path:
    merge_folders("linear", *family, tmp_path / "run" / "model")
    return tmp_path / "run"


def test_nothing_changed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run)]) == 0
    assert main([str(run / "model")]) == 0
    assert "files are unchanged" in capsys.readouterr().out


def flip_last_byte(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize("name", ["run/model/model.safetensors", "run/model/config.json", "target1/model.safetensors"])
def test_a_flipped_byte_is_found(run: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = run.parent / name
    flip_last_byte(path)
    assert main([str(run)]) == 2
    assert capsys.readouterr().err == f"{path}: changed since the merge\n"


def test_missing_files_are_found(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "model" / "tokenizer.json").unlink()
    (run.parent / "base" / "config.json").unlink()
    assert main([str(run)]) == 2
    assert capsys.readouterr().err.count(": missing\n") == 2
    assert main([str(run), "--outputs-only"]) == 2
    assert capsys.readouterr().err.count(": missing\n") == 1


@pytest.mark.parametrize("content", [None, "{}", "[]", "no JSON"])
def test_no_manifest(tmp_path: Path, content: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    assert main([str(tmp_path)]) == 2
    assert "manifest" in capsys.readouterr().err


def test_the_command_needs_no_torch(run: Path) -> None:
    code = (
        "import sys, runpy; sys.argv = ['verify', sys.argv[1]]\n"
        "try: runpy.run_module('fusion.merging.verify', run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0 and 'torch' not in sys.modules, sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, run], cwd=ROOT, check=True)


def test_a_merge_without_checksums_cannot_be_verified_and_says_so(
    family: tuple[Path, list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merge_folders("linear", *family, tmp_path / "model", engine=EngineConfig(checksums=False))
    merge_folders("linear", *family, tmp_path / "checked")
    weights = (tmp_path / name / "model.safetensors" for name in ("model", "checked"))
    assert next(weights).read_bytes() == next(weights).read_bytes()
    assert main([str(tmp_path / "model"), "--outputs-only"]) == 2
    assert "model.safetensors: no checksum was taken (engine.checksums=false)" in capsys.readouterr().err
