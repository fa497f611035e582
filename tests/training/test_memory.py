"""Running out of memory ends with what was needed and the settings that help, in numbers that are right."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from stage1_settings import settings
from tiny_models import make_llama
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fusion.config import UserError
from fusion.config.schema import LoraConfig, ParallelConfig, TrainConfig
from fusion.config.schema import TrainerConfig as Trainer
from fusion.training.data import FusionDataModule
from fusion.training.fit import fit
from fusion.training.memory import Cut, MemoryNeed, advice, is_out_of_memory, memory_need
from fusion.training.student import Student

GIB = 2**30
CONFIG = TrainConfig(trainer=Trainer(micro_batch_size=4, precision="bf16-mixed"))


def kept_bytes(model, precision, tokens):
    """Bytes that the backward pass of the decoder waits for, weights and their copies apart."""
    mixed = torch.autocast("cpu", torch.bfloat16, cache_enabled=False) if precision == "bf16-mixed" else nullcontext()
    weights = {one.shape for one in model.parameters()} | {one.T.shape for one in model.parameters() if one.ndim == 2}
    kept = {}

    def keep(tensor):
        if tensor.shape not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor), mixed:
        model.model(input_ids=torch.arange(tokens)[None] % 64, use_cache=False)
    return sum(one.untyped_storage().nbytes() for one in kept.values())


@pytest.mark.parametrize(
    ("precision", "dtype"), [("32-true", "float32"), ("bf16-mixed", "float32"), ("bf16-true", "bfloat16")]
)
@pytest.mark.parametrize("key_value_heads", [4, 1])
@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_activations_are_those_that_torch_keeps(precision, dtype, key_value_heads, is_checkpointed):
    sizes = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4}
    llama = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=key_value_heads)
    model = LlamaForCausalLM(llama).to(getattr(torch, dtype)).train()
    tokens = 250
    config = replace(CONFIG, trainer=Trainer(precision=precision))
    need = memory_need(model, config, Cut(1, tokens, tokens), 8)
    if is_checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        one_layer = need.activations / 4
        assert kept_bytes(model, precision, tokens) + one_layer == pytest.approx(need.checkpointed, rel=0.15)
    else:
        assert kept_bytes(model, precision, tokens) == pytest.approx(need.activations, rel=0.1)


def test_weights_gradients_and_moments_are_counted():
    model = make_llama(60)
    numbers = sum(one.numel() for one in model.parameters())
    need = memory_need(model, replace(CONFIG, trainer=Trainer()), Cut(2, 64, 40), 16)
    assert (need.weights, need.trained) == (4 * numbers, 12 * numbers)
    assert need.logits == 16 * 60 * 4
    mixed = memory_need(model, CONFIG, Cut(2, 64, 40), 100)
    assert mixed.weights == 6 * numbers
    assert mixed.logits == 40 * 60 * 4
    frozen = model.requires_grad_(False)
    assert memory_need(frozen, CONFIG, Cut(2, 64, 40), 16).trained == 0


LARGE = MemoryNeed(weights=28 * GIB, trained=84 * GIB, activations=40 * GIB, checkpointed=4 * GIB, logits=GIB // 2)


def test_what_saves_most_comes_first_and_another_method_last():
    found = advice(LARGE, Cut(4, 8192, 6000), CONFIG, 4096)
    assert [(one.text.split(" (")[0], one.saved / GIB) for one in found] == [
        ("parallel=fsdp parallel.devices=2", 56),
        ("trainer.gradient_checkpointing=true", 36),
        ("trainer.micro_batch_size=2", 20),
        ("lora=rank16", 84),
    ]
    assert found[2].text.endswith("(now 4)")


def test_what_is_set_already_is_not_advised():
    need = replace(LARGE, weights=GIB, trained=3 * GIB)
    trainer = Trainer(micro_batch_tokens=8000, gradient_checkpointing=True, precision="bf16-mixed")
    config = replace(CONFIG, trainer=trainer, parallel=ParallelConfig(name="fsdp", devices=4), lora=LoraConfig(rank=8))
    found = advice(need, Cut(3, 7800, 100), config, 4096)
    assert [one.text for one in found] == [
        "trainer.micro_batch_tokens=3900 (now 8000)",
        "parallel.devices=8 (now 4, parallel=fsdp)",
        "objective.chunk_rows=25 (now 4096)",
    ]
    assert [one.saved for one in found] == [pytest.approx(4 * GIB * 2 / 3), 2 * GIB, need.logits * 3 / 4]


def test_a_micro_batch_of_one_dialogue_cannot_be_cut():
    found = advice(LARGE, Cut(1, 2048, 1000), CONFIG, 4096)
    assert not any("micro_batch" in one.text for one in found)


@pytest.fixture(scope="module")
def data(tmp_path_factory, tiny_pivot, tiny_source):
    trainer = Trainer(batch_size=8, micro_batch_size=3, progress_bar=False)
    module = FusionDataModule(settings(tmp_path_factory.mktemp("fit"), tiny_pivot, tiny_source, trainer=trainer))
    module.setup()
    return module


def failing(data, monkeypatch, error, at_call):
    """What training says whose forward pass number `at_call` fails."""
    calls = []
    whole = Student.forward

    def forward(student, batch):
        calls.append(batch)
        if len(calls) == at_call:
            raise error
        return whole(student, batch)

    monkeypatch.setattr(Student, "forward", forward)
    with pytest.raises(UserError) as told:
        fit(data.config, data, [])
    return str(told.value).splitlines()


def test_training_says_what_ran_out_and_what_this_run_could_change(data, monkeypatch):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...\nmore")
    parts = len(data.train_dataloader().dataset[0].micro_batches)
    told = failing(data, monkeypatch, error, at_call=parts + 1)
    step = data.train_dataloader().dataset[1]
    tokens = max(one.ids_BT.numel() for one in step.micro_batches)
    rows = len(max(step.micro_batches, key=lambda one: one.ids_BT.numel()).rows_R)
    model = AutoModelForCausalLM.from_pretrained(data.config.pivot.path)
    numbers, vocabulary = sum(one.numel() for one in model.parameters()), model.config.vocab_size
    layer = 32 * 16 + 8 * 8 + 16 * 32  # hidden size, keys and values, inner size of the tiny Llama
    activations, checkpointed = 2 * tokens * layer, tokens * (2 * 4 * 16 + layer)
    assert told[0] == "step 2 ran out of memory: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ..."
    assert told[1].strip() == (
        f"needed are about {mib(4 * numbers)} for weights, {mib(12 * numbers)} for gradients and optimiser, "
        f"{mib(activations)} for activations of {tokens} tokens, {mib(4 * rows * vocabulary)} for logits"
    )
    expected = {
        f"parallel=fsdp parallel.devices=2 (now parallel=single) saves about {mib(8 * numbers)}": 8 * numbers,
        f"trainer.gradient_checkpointing=true (now false) saves about {mib(activations - checkpointed)}": activations
        - checkpointed,
        f"trainer.micro_batch_size=1 (now 3) saves about {mib(activations * 2 / 3)}": activations * 2 / 3,
        f"objective.chunk_rows={rows // 4} (now {(1 << 22) // vocabulary}) saves about "
        f"{mib(4 * rows * vocabulary * (1 - rows // 4 / rows))}": 3 * rows * vocabulary,
    }
    best = sorted(expected, key=lambda text: -expected[text])[:3]
    assert [line.strip() for line in told[2:5]] == best
    assert told[5].strip().startswith("lora=rank16")
    assert told[5].endswith(mib(12 * numbers))


def mib(size):
    return f"{size / 2**20:.2f} MiB"


def test_the_memory_of_the_cpu_ends_in_the_same_way(data, monkeypatch):
    message = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: not enough memory: you tried to ..."
    told = failing(data, monkeypatch, RuntimeError(message), at_call=1)
    assert told[0].startswith("step 1 ran out of memory: [enforce fail")


def test_other_errors_stay_what_they_are(data, monkeypatch):
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        failing(data, monkeypatch, RuntimeError("shapes do not fit"), at_call=1)
