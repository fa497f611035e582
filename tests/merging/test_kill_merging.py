"""SIGKILL at any moment of a merge: what is finished is not merged again, and every byte is the same."""

import os
import random
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forked import ended, file_events, fork, killed
from merge_inputs import DATA_FREE, save_model, width

from fusion.cache import file_hash
from fusion.config import UserError
from fusion.config.schema import EngineConfig
from fusion.merging import Evidence, MergeReport, merge_folders, method_names
from fusion.merging.checkpoints import output as output_module
from fusion.merging.checkpoints.checkpoint import open_checkpoint
from fusion.merging.checkpoints.manifest import differences
from fusion.merging.checkpoints.output import Output
from fusion.merging.checkpoints.working import working_folder

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a process that has used a GPU cannot be forked")

KILLS = 50
NUM_LAYERS = 12
ENGINE = EngineConfig(threads=2, probe_disk=False)
SHARDS = EngineConfig(threads=2, probe_disk=False, shard_size="4KiB")
KINDS = {
    "fisher": "squared_gradients",
    "regmean": "input_products",
    "learned": "learned_coefficients",
    "fisher_learned": "fisher_coefficients",
}
METHODS = [*DATA_FREE, *KINDS]
SHAPES = {
    "model.embed_tokens.weight": (40, 24),
    **{f"model.layers.{i}.{part}.weight": (24, 24) for i in range(NUM_LAYERS) for part in ("attn", "mlp")},
    "model.norm.weight": (24,),
}


def state(seed, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    return {name: (size * torch.randn(shape, generator=generator)).bfloat16() for name, shape in SHAPES.items()}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base and three targets of many small tensors, in shards."""
    root = tmp_path_factory.mktemp("models")
    base = state(0)
    steps = [state(j, 0.02) for j in (1, 2, 3)]
    targets = [{name: base[name] + step[name] for name in base} for step in steps]
    return [save_model(root / str(j), one, num_shards=2) for j, one in enumerate([base, *targets])]


@pytest.fixture(autouse=True)
def journal_of_few_tensors(monkeypatch):
    """Every third tensor or so; merges as small as these would be finished before the first entry is due."""
    monkeypatch.setattr(output_module, "COMMIT_BYTES", 3000)


def evidence(method, num_targets):
    """Something that a method can weigh by, for all matrices; None for most methods."""
    if method not in KINDS:
        return None
    matrices = {name: state(7)[name].float() for name, shape in SHAPES.items() if len(shape) == 2}
    measured = {
        "squared_gradients": lambda j: {name: (one + j).square() for name, one in matrices.items()},
        "input_products": lambda j: {name: (one + j).T @ (one + j) for name, one in matrices.items()},
        "learned_coefficients": lambda j: {name: torch.tensor(0.1 * j + 0.2) for name in SHAPES},
    }

    def of(kind):
        return Evidence(kind, tuple(measured[kind](j) for j in range(num_targets)), "made by hand")

    if method == "fisher_learned":
        return replace(of("squared_gradients"), kind=KINDS[method], beside=of("learned_coefficients"))
    return of(KINDS[method])


def merge(method: str, models: list[Path], out: Path, engine: EngineConfig | None = None) -> MergeReport:
    """Every other method writes many small shards, the others the base's two files."""
    base, *targets = models
    targets = targets[: width(method)]
    engine = engine or (SHARDS if METHODS.index(method) % 2 else ENGINE)
    return merge_folders(method, base, targets, out, engine=engine, evidence=evidence(method, len(targets)))


def contents(folder: Path) -> dict[str, str]:
    return {path.name: file_hash(path) for path in folder.iterdir() if not path.name.startswith(".")}


def journalled(out: Path) -> list[str]:
    journal = working_folder(out) / ".journal"
    return journal.read_bytes().split(b"\n")[1:-1] if journal.is_file() else []


def kills_of(method: str) -> int:
    place, each = METHODS.index(method), KILLS // len(METHODS)
    return each + (place < KILLS - each * len(METHODS))


def test_every_method_is_killed():
    assert sorted(METHODS) == method_names()
    assert sum(map(kills_of, METHODS)) == KILLS


@pytest.mark.parametrize("method", METHODS)
def test_a_merge_that_is_killed_goes_on_to_the_same_bytes(method, models, tmp_path, monkeypatch):
    merge(method, models, tmp_path / "whole")  # compiled loops are loaded here, once for all
    events = file_events(lambda: merge(method, models, tmp_path / "counted"))
    out, moments, kills, longest = tmp_path / "killed", random.Random(method), 0, 0
    while kills < kills_of(method):
        if killed(lambda: merge(method, models, out), moments, events):
            kills += 1
            assert len(journalled(out)) >= longest or out.exists()  # what was finished is never lost
            longest = len(journalled(out))
        if out.exists():  # killed behind the rename, or not at all
            assert differences(out / "manifest.json")[1] == []
            shutil.rmtree(out)
            longest = 0
    finished, written = len(journalled(out)), set()
    write = Output.write
    monkeypatch.setattr(Output, "write", lambda self, name, *block: written.add(name) or write(self, name, *block))
    report = merge(method, models, out)
    assert report.resumed == finished
    assert len(written) == len(SHAPES) - finished
    assert contents(out) == contents(tmp_path / "whole")
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("engine", [ENGINE, SHARDS], ids=["files", "shards"])
def test_kills_do_come_in_the_middle(models, tmp_path, monkeypatch, engine):
    """Killed behind some tensors: those in the journal stay, byte for byte, and the rest is merged."""
    merge("sce", models, tmp_path / "whole", engine)
    assert len(list((tmp_path / "whole").glob("*.safetensors"))) == (2 if engine is ENGINE else 9)
    append, killed = Output._commit, tmp_path / "killed"

    def dies(self, group):
        append(self, group)
        if len(journalled(killed)) > 10:
            os.kill(os.getpid(), 9)

    with monkeypatch.context() as patch:
        patch.setattr(Output, "_commit", dies)
        assert ended(fork(lambda: merge("sce", models, killed, engine))) == -9
    assert not killed.exists()
    with (working_folder(killed) / ".journal").open("ab") as journal:
        journal.write(b'{"name": "model.norm.wei')  # a line that a power cut has torn
    assert 10 < merge("sce", models, killed, engine).resumed < 20
    assert contents(killed) == contents(tmp_path / "whole")


def test_a_merge_with_other_settings_does_not_go_on_with_what_is_there(models, tmp_path, monkeypatch):
    base, *targets = models
    monkeypatch.setattr(Output, "_commit", lambda self, group: os.kill(os.getpid(), 9))
    assert ended(fork(lambda: merge("linear", models, tmp_path / "out", ENGINE))) == -9
    monkeypatch.undo()
    report = merge_folders("linear", base, targets, tmp_path / "out", scale=2.0, engine=ENGINE)
    assert report.resumed == 0
    merge_folders("linear", base, targets, tmp_path / "whole", scale=2.0, engine=ENGINE)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_disk_that_is_full_in_the_middle(models, tmp_path):
    """Nothing is seen, no mistake of the user is claimed, and the same merge goes on once there is room."""
    size = max(file.num_bytes for file in open_checkpoint(models[0]).files)

    def merge_with_little_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))
        try:
            merge("ties", models, tmp_path / "out", ENGINE)
        except UserError:
            os._exit(3)
        except OSError:
            os._exit(4)

    assert ended(fork(merge_with_little_room)) == 4
    assert not (tmp_path / "out").exists()
    merge("ties", models, tmp_path / "out", ENGINE)
    merge("ties", models, tmp_path / "whole", ENGINE)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
