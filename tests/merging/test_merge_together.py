"""Several merges of the same inputs in one pass: the bytes of separate merges, and every input byte read once."""

from pathlib import Path

import pytest
import torch
from merge_inputs import save_model

from fusion.config import UserError
from fusion.config.schema import EngineConfig
from fusion.merging import (
    MergeRequest,
    merge_deltas,
    merge_deltas_together,
    merge_folders,
    merge_folders_together,
)
from fusion.merging.checkpoints.tensor_file import TensorFile
from fusion.merging.deltas import BLOCK_ELEMENTS, block_length

Family = tuple[Path, list[Path]]
REQUESTS = [
    *(MergeRequest("sce", {"tau": tau}) for tau in (0.05, 0.1, 0.2)),
    MergeRequest("sce", {"tau": 0.1}, scale=1.7),
    MergeRequest("ties", {"density": 0.5}),
    MergeRequest("ties", {"density": 0.5, "trim": "model"}),
    MergeRequest("dare_linear", seed=3),
    MergeRequest("dare_linear", seed=4),
    MergeRequest("varm", {"unit": "layer"}),
]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Two targets; one tensor has several blocks, the last of which is not full."""
    folder, generator = tmp_path_factory.mktemp("large"), torch.Generator().manual_seed(0)
    shapes = {"model.layers.0.w": (3 * BLOCK_ELEMENTS // 500 + 9, 500), "model.layers.1.w": (50, 40), "norm": (40,)}
    base = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    targets = [
        {name: (w + 0.02 * torch.randn(w.shape, generator=generator)).bfloat16() for name, w in base.items()}
        for _ in range(2)
    ]
    return save_model(folder / "base", base), [save_model(folder / f"t{j}", one) for j, one in enumerate(targets)]


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, str, int]]:
    """File, tensor and place of everything that is read, but for the small pieces of samples."""
    seen, read_span = [], TensorFile.read_span

    def counted(file: TensorFile, name: str, start: int, into_N: torch.Tensor) -> None:
        spec = file.specs[name]
        if start + into_N.numel() in (start + block_length(spec.shape), spec.num_elements):
            seen.append((file.path, name, start))
        read_span(file, name, start, into_N)

    monkeypatch.setattr(TensorFile, "read_span", counted)
    return seen


@pytest.mark.parametrize("threads", [1, 2])
def test_the_models_are_those_of_separate_merges(large: Family, tmp_path: Path, threads: int) -> None:
    engine = EngineConfig(threads=threads, probe_disk=False)
    outs = [tmp_path / f"together{i}" for i in range(len(REQUESTS))]
    reports = merge_folders_together(REQUESTS, *large, outs, engine=engine)
    for i, (request, out, report) in enumerate(zip(REQUESTS, outs, reports, strict=True)):
        given = {"scale": request.scale, "seed": request.seed, **request.parameters}
        alone = merge_folders(request.method, *large, tmp_path / f"alone{i}", engine=engine, **given)
        for path in (tmp_path / f"alone{i}").iterdir():
            assert path.read_bytes() == (out / path.name).read_bytes(), (request, path.name)
        assert report.merged_together == len(REQUESTS)
        changed = {"seconds", "merged_together"}
        assert {k: v for k, v in vars(alone).items() if k not in changed} == {
            k: v for k, v in vars(report).items() if k not in changed
        }


def test_every_byte_of_the_inputs_is_read_once_for_all(large: Family, tmp_path: Path, spans: list) -> None:
    requests = [MergeRequest("sce", {"tau": tau}) for tau in (0.05, 0.1, 0.2)]
    engine = EngineConfig(threads=2, probe_disk=False, checksums=False)
    merge_folders("linear", *large, tmp_path / "one", engine=engine)  # one pass over the blocks: the fewest reads
    fewest = sorted(spans)
    assert len(set(fewest)) == len(fewest) == 3 * (4 + 1 + 1)
    spans.clear()
    merge_folders_together(requests, *large, [tmp_path / str(i) for i in range(3)], engine=engine)
    assert sorted(spans) == fewest
    spans.clear()
    for i, request in enumerate(requests):
        merge_folders(request.method, *large, tmp_path / f"alone{i}", engine=engine, **request.parameters)
    assert sorted(spans) == sorted(3 * fewest)


def test_deltas_in_memory_are_those_of_separate_merges() -> None:
    generator = torch.Generator().manual_seed(0)
    base, *targets = ({"w": torch.randn(30, 7, generator=generator)} for _ in range(3))
    for request, merged in zip(REQUESTS, merge_deltas_together(REQUESTS, base, targets), strict=True):
        alone = merge_deltas(request.method, base, targets, seed=request.seed, **request.parameters)
        assert torch.equal(merged.deltas["w"], alone.deltas["w"])
        assert merged.report.coefficients == alone.report.coefficients


def test_weights_and_deltas_can_be_merged_together(large: Family, tmp_path: Path) -> None:
    requests = [MergeRequest("slerp", {"t": 0.3}), MergeRequest("linear"), MergeRequest("tsv_m")]
    merge_folders_together(requests, *large, [tmp_path / request.method for request in requests])
    for request in requests:
        merge_folders(request.method, *large, tmp_path / "alone" / request.method, **request.parameters)
        weights = [folder / request.method / "model.safetensors" for folder in (tmp_path, tmp_path / "alone")]
        assert weights[0].read_bytes() == weights[1].read_bytes()


def test_problems_of_all_requests_come_together_and_leave_nothing(large: Family, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    requests = [MergeRequest("sce", {"tau": 2.0}), MergeRequest("ties", {"densty": 0.5}), MergeRequest("linear")]
    with pytest.raises(UserError) as caught:
        merge_folders_together(requests, *large, [tmp_path / "a", tmp_path / "b", tmp_path / "full"])
    problems = "\n".join(caught.value.problems)
    assert all(part in problems for part in ("tau", "densty", "exists and is not empty"))
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_one_merge_that_fails_leaves_nothing_of_any(large: Family, tmp_path: Path) -> None:
    requests = [MergeRequest("linear"), MergeRequest("linear", scale=1e39)]
    with pytest.raises(UserError, match="overflows"):
        merge_folders_together(requests, *large, [tmp_path / "a", tmp_path / "b"])
    assert list(tmp_path.iterdir()) == []
