"""Packed dialogues are read apart: same hidden states, same loss, same gradients; models that cannot are refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from stage1_settings import settings
from tiny_models import make_llama, make_tokenizer, save
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
)

from fusion.config import UserError
from fusion.config.schema import ObjectiveConfig, TrainerConfig
from fusion.objective.fused_store import FusedExample
from fusion.objective.target_form import TargetForm
from fusion.teaching.causal_lm import final_hidden
from fusion.teaching.sparse_rows import gather_entries
from fusion.training.batches import collate
from fusion.training.data import FusionDataModule
from fusion.training.fit import fit
from fusion.training.packing import require_packing
from fusion.training.student import Student

CPU = torch.device("cpu")
VOCAB_SIZE = 80
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
GROUPED = {**SIZES, "num_key_value_heads": 1}
OPT = OPTConfig(vocab_size=80, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2, init_std=0.3)
WINDOW = 4
"""Tokens that a layer with sliding attention sees: fewer than the dialogues have."""
ABLE = {
    "llama": LlamaConfig(**GROUPED),
    "qwen2": Qwen2Config(**GROUPED),
    "mistral": MistralConfig(**GROUPED, sliding_window=WINDOW),
    "gpt_neox": GPTNeoXConfig(**SIZES),
    "gemma2": Gemma2Config(**GROUPED, head_dim=8, sliding_window=WINDOW),
}
UNABLE = {
    "opt": OPT,
    "bloom": BloomConfig(vocab_size=80, hidden_size=16, n_layer=2, n_head=2, initializer_range=0.3),
    "falcon": FalconConfig(
        vocab_size=80, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.3
    ),
    "mamba": MambaConfig(vocab_size=80, hidden_size=16, num_hidden_layers=2, state_size=4, initializer_range=0.3),
}
ATTENTIONS = [(name, one) for name in ABLE for one in ("sdpa", "eager") if (name, one) != ("gemma2", "sdpa")]


def make_student(config, attention="eager"):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return Student(model.train(), ObjectiveConfig(ce_weight=0.3), TargetForm())


def make_dialogue(length, draw):
    """Random tokens and targets; every third row is supervised."""
    rows_R = np.arange(1, length - 1, 3)
    row_E = np.repeat(np.arange(len(rows_R)), 3)
    targets = gather_entries(row_E, draw.integers(0, VOCAB_SIZE, len(row_E)), draw.random(len(row_E)), len(rows_R))
    return FusedExample(draw.integers(0, VOCAB_SIZE, length).astype(np.int32), rows_R, targets)


def loss_and_gradients(student, batch):
    student.zero_grad()
    loss = student(batch).loss
    loss.backward()
    return float(loss.detach()), {name: one.grad.clone() for name, one in student.named_parameters()}


@pytest.mark.parametrize(("name", "attention"), ATTENTIONS)
def test_packed_and_padded_dialogues_learn_the_same(name, attention):
    """Relative 1e-5 of the loss and of the gradient of every weight, in float32."""
    student = make_student(ABLE[name], attention)
    draw = np.random.default_rng(0)
    dialogues = [make_dialogue(length, draw) for length in (11, 4, 17, 9)]
    padded, wanted = loss_and_gradients(student, collate(dialogues, student.form))
    packed, found = loss_and_gradients(student, collate(dialogues, student.form, packed=True))
    assert packed == pytest.approx(padded, rel=1e-5)
    assert set(found) == set(wanted)
    for weight, gradient in wanted.items():
        assert (found[weight] - gradient).norm() <= 1e-5 * gradient.norm(), weight
    require_packing(student, CPU)
    assert student.training


@pytest.mark.parametrize(("name", "attention"), ATTENTIONS)
def test_the_first_token_behind_another_dialogue_reads_nothing_of_it(name, attention):
    student = make_student(ABLE[name], attention)
    draw = np.random.default_rng(1)
    last = make_dialogue(6, draw)
    together = [collate([make_dialogue(5, draw), last], student.form, packed=True) for _ in range(2)]
    first, second = (
        final_hidden(student.model, batch.ids_BT, batch.mask_BT, batch.positions_BT)[0, 5:] for batch in together
    )
    assert not torch.equal(together[0].ids_BT, together[1].ids_BT)
    torch.testing.assert_close(first, second, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", UNABLE)
def test_models_that_read_on_into_the_next_dialogue_are_refused(name):
    student = make_student(UNABLE[name])
    with pytest.raises(UserError, match=rf"packing=true: {name} models with eager attention do not .*packing=false"):
        require_packing(student, CPU)
    assert student.training
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(UserError, match="their hidden states change by"):
        require_packing(student, CPU)


@pytest.mark.parametrize("name", ABLE)
def test_rounding_is_not_taken_for_reading_on(name):
    student = make_student(ABLE[name])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        require_packing(student, CPU)
    require_packing(student.bfloat16(), CPU)


def test_dropout_is_not_taken_for_reading_on():
    student = make_student(LlamaConfig(**GROUPED, attention_dropout=0.5))
    require_packing(student, CPU)


def test_a_decoder_without_positions_is_refused():
    student = make_student(ABLE["llama"])
    decoder = student.model.base_model
    read = decoder.forward
    decoder.forward = lambda input_ids, attention_mask=None, use_cache=False: read(input_ids, attention_mask)
    with pytest.raises(UserError, match="unexpected keyword argument 'position_ids'"):
        require_packing(student, CPU)


def test_a_run_that_cannot_pack_ends_before_its_first_step(tmp_path, tiny_source):
    tokenizer = make_tokenizer("metaspace", "openchat")
    config = OPTConfig(**{**OPT.to_dict(), "vocab_size": len(tokenizer)})
    pivot = save(tmp_path / "opt", OPTForCausalLM(config), tokenizer, "pivot")
    trainer = TrainerConfig(epochs=1, batch_size=8, packing=True, progress_bar=False)
    module = prepared(tmp_path, pivot, tiny_source, trainer)
    with pytest.raises(UserError, match=r"opt models with sdpa attention .* set trainer\.packing=false"):
        fit(module.config, module, [])
    padded = FusionDataModule(replace(module.config, trainer=replace(trainer, packing=False, max_steps=1)))
    padded.prepared = module.prepared
    assert fit(padded.config, padded, []).steps == 1


def test_packed_mixed_precision_trains(tmp_path, tiny_source):
    tokenizer = make_tokenizer("metaspace", "openchat")
    pivot = save(tmp_path / "llama", make_llama(len(tokenizer)), tokenizer, "pivot")
    trainer = TrainerConfig(epochs=1, max_steps=1, batch_size=8, packing=True, precision="bf16-mixed")
    module = prepared(tmp_path, pivot, tiny_source, replace(trainer, progress_bar=False, gradient_checkpointing=True))
    fitted = fit(module.config, module, [])
    assert fitted.steps == 1
    assert np.isfinite(fitted.metrics["train/loss"])


def prepared(folder, pivot, source, trainer):
    module = FusionDataModule(settings(folder, pivot, source, trainer=trainer))
    module.setup()
    return module
