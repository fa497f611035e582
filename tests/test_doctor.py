"""The doctor sees what is missing, says what to do, and harms nothing."""

import pytest

from fusion import doctor
from fusion.doctor import Finding, examine, main


def by_subject(tmp_path):
    return {finding.subject: finding for finding in examine(tmp_path / "cache", tmp_path / "runs")}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)


def test_a_healthy_machine(tmp_path, capsys):
    assert main(["--cache", str(tmp_path / "cache"), "--runs", str(tmp_path / "runs")]) == 0
    said = capsys.readouterr().out
    for word in ("python", "torch", "transformers", "cpu", "cache", "runs", "hub", "wandb", "everything that a job"):
        assert word in said
    assert list(tmp_path.iterdir()) == []


def test_missing_and_old_packages_are_named_with_the_command(tmp_path, monkeypatch):
    needed = ["numpy>=99", "no-such-package>=1", "torch>=2", "pytest>=99; extra == 'dev'"]
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: needed)
    missing = [finding for finding in examine(tmp_path, tmp_path) if finding.verdict == "missing"]
    assert [finding.text.split()[0].rstrip(":") for finding in missing] == ["numpy", "no-such-package"]
    assert all("pip install" in finding.text for finding in missing)
    monkeypatch.setattr("sys.argv", ["doctor"])
    assert main(["--cache", str(tmp_path)]) == 1


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(**options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "NamedTemporaryFile", refuse)
    found = by_subject(tmp_path)
    assert found["cache"].verdict == "missing"
    assert "paths.cache=FOLDER" in found["cache"].text


def test_a_hub_that_is_not_reached_is_a_note():
    def fail():
        raise OSError("no route")

    assert doctor._reached(fail) == Finding(
        "note", "hub", "https://huggingface.co is not reached (no route); folders and downloaded models work"
    )


def test_a_login_is_seen(tmp_path, monkeypatch):
    assert by_subject(tmp_path)["hub"].verdict == "note"
    monkeypatch.setattr(doctor, "_has_netrc", lambda host: host == "api.wandb.ai")
    assert by_subject(tmp_path)["wandb"].verdict == "ok"
