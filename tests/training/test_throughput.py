"""Rates, model FLOPs and memory: counted as documented, measured after the warm-up, and there to be read."""

import csv
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pytorch_lightning.loggers import CSVLogger
from stage1_settings import settings
from tiny_models import make_llama, make_qwen
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from fusion.config.schema import ObjectiveConfig, TrainerConfig
from fusion.objective.target_form import TargetForm
from fusion.training import throughput
from fusion.training.batches import FusionBatch
from fusion.training.data import FusionDataModule
from fusion.training.fit import fit
from fusion.training.flops import PEAK_TFLOPS, ModelFlops, peak_flops
from fusion.training.student import Student

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
VOCABULARY = 60


def make_mixtral():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    experts = {"num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=VOCABULARY, **sizes, **experts))
    model.set_experts_implementation("eager")  # torch does not count grouped products
    return model


def batch_of(dialogues, tokens, rows):
    """Dialogues of equal length, every one with `rows` supervised rows."""
    ids_BT = torch.arange(dialogues * tokens).reshape(dialogues, tokens) % VOCABULARY
    rows_R = torch.cat([number * tokens + torch.arange(rows) for number in range(dialogues)])
    targets_RK = torch.stack([rows_R % VOCABULARY, (rows_R + 1) % VOCABULARY], dim=1)
    return FusionBatch(ids_BT, torch.ones_like(ids_BT), rows_R, targets_RK, torch.ones(len(rows_R), 2))


def product_flops(total_shape, left_shape, right_shape, *_, **__):
    return 2 * left_shape[0] * left_shape[1] * right_shape[1]


def counted(model, batch):
    """FLOPs of a forward and a backward pass of the student, as torch counts them."""
    student = Student(model.train(), ObjectiveConfig(), TargetForm())
    in_place = {torch.ops.aten.addmm_: product_flops}  # torch counts only the product that makes a new tensor
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        student(batch).loss.backward()
    return counter.get_total_flops()


def frozen_but_attention(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "self_attn" in name or "embed" in name
    return model


@pytest.mark.parametrize(
    "make",
    [
        lambda: make_llama(VOCABULARY),
        lambda: make_llama(VOCABULARY, bias=True),
        lambda: make_qwen(VOCABULARY),
        make_mixtral,
        lambda: frozen_but_attention(make_llama(VOCABULARY)),
    ],
    ids=["llama", "biases", "tied head", "experts", "frozen weights"],
)
@pytest.mark.parametrize(("dialogues", "tokens", "rows"), [(1, 64, 63), (2, 16, 5)])
def test_the_formula_counts_what_torch_counts(make, dialogues, tokens, rows):
    model = make()
    model.set_attn_implementation("eager")
    wanted = counted(model, batch_of(dialogues, tokens, rows))
    assert ModelFlops.of(model).step([tokens] * dialogues, dialogues * rows) == pytest.approx(wanted, rel=1e-3)


def test_the_formula_of_a_7b_model_is_palms():
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())  # the first Llama: 6.74 billion weights, 0.13 of them embeddings
    per_token = ModelFlops.of(model).step([2048], 2048) / 2048
    assert per_token == pytest.approx(6 * (6.738e9 - 0.131e9) + 12 * 32 * 32 * 128 * 2048, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "precision", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16-mixed", 989.4),
        ("NVIDIA H100 PCIe", "bf16-true", 756.0),
        ("NVIDIA H200", "bf16-mixed", 989.4),
        ("NVIDIA A100-SXM4-40GB", "bf16-mixed", 312.0),
        ("NVIDIA A100-SXM4-40GB", "32-true", 19.5),
        ("NVIDIA A10G", "bf16-true", 70.0),
        ("NVIDIA A10", "bf16-true", 125.0),
        ("NVIDIA L40S", "bf16-true", 362.0),
        ("NVIDIA RTX A4000", "bf16-true", None),
        ("NVIDIA A100-SXM4-40GB", "64-true", None),
    ],
)
def test_peaks_are_found_by_the_devices_name(monkeypatch, name, precision, tera):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(CUDA, precision) == (None if tera is None else pytest.approx(tera * 1e12))
    assert peak_flops(CPU, precision) is None


def test_float32_products_in_tf32_have_their_own_peak(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-40GB")
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert peak_flops(CUDA, "32-true") == pytest.approx(156e12)
    assert all(half > tf32 >= single for half, tf32, single in PEAK_TFLOPS.values())


@pytest.fixture(scope="module")
def data(tmp_path_factory, tiny_pivot, tiny_source):
    module = FusionDataModule(settings(tmp_path_factory.mktemp("fit"), tiny_pivot, tiny_source))
    module.setup()
    return module


def trained(data, folder, **changes):
    """Train on `data` with other trainer settings: what `fit` returns, and the rows of the CSV log."""
    config = replace(data.config, trainer=TrainerConfig(batch_size=4, progress_bar=False, **changes))
    module = FusionDataModule(config)
    module.prepared = data.prepared
    fitted = fit(config, module, [CSVLogger(folder, name=None, version="csv")])
    with (folder / "csv/metrics.csv").open() as file:
        rows = [{name: float(text) for name, text in row.items() if text} for row in csv.DictReader(file)]
    return module, fitted, rows


def test_every_log_line_has_the_rates_of_its_own_steps(data, tmp_path):
    module, fitted, rows = trained(data, tmp_path, epochs=2, log_every_steps=1, peak_tflops=0.5)
    store, flops = data.prepared.fused, ModelFlops.of(fitted.model)
    assert len(rows) == fitted.steps == module.total_steps > throughput.WARMUP_STEPS
    tokens = dialogues = 0
    for step, row in enumerate(rows):
        examples = module.plan.step(step)
        lengths, supervised = store.lengths[examples], int(store.num_rows[examples].sum())
        tokens, dialogues = tokens + int(lengths.sum()), dialogues + len(examples)
        assert (row["train/tokens"], row["train/dialogues"]) == (tokens, dialogues)
        assert 0.05 < row["train/peak_memory_gib"] < 64
        assert row["train/grad_norm"] > 0
        if step < throughput.WARMUP_STEPS:
            assert "train/tokens_per_second" not in row
            continue
        speed = row["train/tokens_per_second"]
        assert row["train/supervised_tokens_per_second"] / speed == pytest.approx(supervised / lengths.sum(), rel=1e-5)
        per_token = flops.step(lengths.tolist(), supervised) / lengths.sum()
        assert row["train/mfu"] / speed == pytest.approx(per_token / 0.5e12, rel=1e-5)


def test_the_result_has_the_rates_of_the_whole_run(data, tmp_path):
    _, fitted, rows = trained(data, tmp_path, epochs=2, log_every_steps=1)
    timed = rows[throughput.WARMUP_STEPS :]
    tokens = np.diff([0, *(row["train/tokens"] for row in rows)])[throughput.WARMUP_STEPS :]
    seconds = [number / row["train/tokens_per_second"] for number, row in zip(tokens, timed, strict=True)]
    assert fitted.metrics["train/tokens_per_second"] == pytest.approx(sum(tokens) / sum(seconds), rel=1e-4)
    assert fitted.metrics["train/loss"] == pytest.approx(rows[-1]["train/loss"])
    assert "train/mfu" not in fitted.metrics  # nobody knows what a CPU could do


def test_a_run_shorter_than_a_log_interval_has_metrics_too(data, tmp_path):
    config = replace(data.config, trainer=TrainerConfig(batch_size=4, max_steps=3, progress_bar=False))
    module = FusionDataModule(config)
    module.prepared = data.prepared
    metrics = fit(config, module, []).metrics
    assert metrics["train/tokens"] == module.tokens_trained(3)
    assert metrics["train/tokens_per_second"] > 0


def test_slow_first_steps_are_not_timed(data, tmp_path, monkeypatch):
    """Every look at the clock is a second later, but the warm-up takes an hour."""
    now = {"seconds": 0.0}

    class Slow(throughput.Throughput):
        def on_train_batch_end(self, trainer, *others):
            now["seconds"] += 3600 if trainer.global_step <= throughput.WARMUP_STEPS else 2
            super().on_train_batch_end(trainer, *others)

    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: now["seconds"]))
    monkeypatch.setattr("fusion.training.fit.Throughput", Slow)
    module, fitted, _ = trained(data, tmp_path, epochs=2, log_every_steps=1)
    timed = fitted.steps - throughput.WARMUP_STEPS
    tokens = module.tokens_trained(fitted.steps) - module.tokens_trained(throughput.WARMUP_STEPS)
    assert fitted.metrics["train/tokens_per_second"] == pytest.approx(tokens / (2 * timed))
