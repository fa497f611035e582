"""The benchmark of a training step measures what the product does, on any device, and says where it cannot run."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from fusion.training.flops import ModelFlops

BENCHMARKS = Path(__file__).resolve().parents[2] / "experiments" / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import training_step

    monkeypatch.setattr(training_step, "PRODUCT", 64)
    return training_step


WAYS = {
    "plain": (),
    "sharded": ("--parallel", "fsdp", "--checkpoint", "--dtype", "mixed"),
    "as on a GPU": ("--parallel", "fsdp", "--checkpoint", "--dtype", "bfloat16"),
}


@pytest.mark.parametrize("words", WAYS.values(), ids=WAYS)
def test_sft_and_fusion_side_by_side(benchmark, tmp_path, capsys, words):
    shape = ("--shape", "tiny", "--length", "20", "--dialogues", "2", "--rounds", "2")
    benchmark.main([*shape, *words, "--out", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    tiny, peak = found["shapes"]["tiny"], found["peak"]
    model = AutoModelForCausalLM.from_config(benchmark.SHAPES["tiny"].config)
    flops = ModelFlops.of(model).step([20, 20], 2 * 14)  # 70 % of the tokens are supervised
    for way in ("sft", "fusion"):
        one = tiny[way]
        assert len(one["all_seconds"]) == 2
        assert one["seconds"] == min(one["all_seconds"])
        assert one["tokens_per_second"] == pytest.approx(40 / one["seconds"])
        assert one["mfu"] == pytest.approx(flops / one["seconds"] / peak["flops"])
        assert 0.05 < one["peak_memory_gib"] < 64
    ratio = tiny["sft"]["seconds"] / tiny["fusion"]["seconds"]
    assert found["rows"][0]["ratio"] == pytest.approx(ratio)
    assert "tiny: fusion against SFT" in capsys.readouterr().out
    assert not torch.distributed.is_initialized()


def test_no_gpu_is_said_with_status_2(benchmark, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        benchmark.main(["--device", "cuda", "--shape", "7b", "--dtype", "bfloat16", "--length", "2048"])
    assert ended.value.code == 2
    assert "--device cuda: this machine has no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--length", "3"], ["--dialogues", "0"], ["--rounds", "0"]])
def test_sizes_that_measure_nothing_are_refused(benchmark, words):
    with pytest.raises(SystemExit) as ended:
        benchmark.main(["--shape", "tiny", *words])
    assert ended.value.code == 2


def test_a_model_made_on_the_meta_device_has_all_that_no_file_holds(benchmark):
    from steps import CPU, SHAPES, make_model

    made = make_model(SHAPES["tiny"], CPU, torch.float32)
    torch.manual_seed(1)
    usual = AutoModelForCausalLM.from_config(SHAPES["tiny"].config)
    for name, buffer in usual.named_buffers():
        assert torch.equal(made.get_buffer(name), buffer), name
    for name, weight in usual.named_parameters():
        found, wanted = (float(one.detach().std()) for one in (made.get_parameter(name), weight))
        assert found == pytest.approx(wanted, rel=0.1), name


def test_large_shapes_have_the_sizes_of_what_they_are_called(benchmark):
    sizes = {}
    for name in ("1b", "3b", "7b", "8b"):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(benchmark.SHAPES[name].config)
        sizes[name] = round(sum(one.numel() for one in model.parameters()) / 1e9, 2)
    assert sizes == {"1b": 1.24, "3b": 3.21, "7b": 7.24, "8b": 8.03}
