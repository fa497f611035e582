"""Two processes train as one does: DDP, FSDP2, FSDP2 in two replicas, and the older FSDP."""

from dataclasses import replace

import pytest
import torch
from checkpointed import STEPS, changed, prepared
from parallel_fits import run_fits
from safetensors.torch import load_file
from tiny_models import make_llama, make_tokenizer, save
from transformers import AutoModelForCausalLM

from fusion.config.schema import ParallelConfig
from fusion.training.fit import fit
from fusion.training.module import FusionModule

LOSS, NORM, WEIGHT = 1e-5, 1e-4, 1e-4
"""Relative tolerances over 24 steps in float32; norms of the gradients and weights have less of what averages out."""
KINDS = {
    "ddp": ParallelConfig("ddp", devices=2, accelerator="cpu"),
    "fsdp": ParallelConfig("fsdp", devices=2, accelerator="cpu"),
    "fsdp_replicas": ParallelConfig("fsdp", devices=2, accelerator="cpu", replicas=2),
    "fsdp1": ParallelConfig("fsdp1", devices=2, accelerator="cpu"),
}
CUTS = {
    "whole": {},
    "accumulated": {"micro_batch_size": 1},
    "by_tokens": {"micro_batch_tokens": 60},
    "packed": {"packing": True, "micro_batch_tokens": 60},
    "checkpointed": {"gradient_checkpointing": True},
    "uneven": {"batch_size": 3},  # one of the two devices has nothing to read in the last micro-batch
}
"""Every way to cut a step, on one kind of parallelism at least."""
PAIRS = [
    *((kind, "accumulated") for kind in KINDS),
    *(("fsdp", cut) for cut in CUTS if cut != "accumulated"),
    *(("ddp", cut) for cut in ("uneven", "packed")),
    ("fsdp_replicas", "uneven"),
]


@pytest.fixture(scope="module", params=["own head", "tied head"])
def data(request, tmp_path_factory, tiny_source):
    """Gradients are clipped in most steps: the norm is over all shards."""
    folder = tmp_path_factory.mktemp("devices")
    module = prepared(folder, tiny_source, dropout=0.0)
    if request.param == "tied head":
        tokenizer = make_tokenizer("metaspace", "openchat")
        model = make_llama(len(tokenizer))
        model.config.tie_word_embeddings = True
        model.tie_weights()
        tied = save(folder / "tied", model, tokenizer, "pivot")
        module.prepared.inputs["pivot"] = "tied"
        module = changed(module, pivot=tied)
    return changed(module, checkpoint_every_steps=0)


def alone(data, cut):
    """Losses, norms and weights of one process."""
    module = changed(data, **CUTS[cut])
    module.setup()
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FusionModule, "on_before_optimizer_step", lambda one, _: seen.append(one.outcome))
        model = fit(module.config, module, []).model
    return [float(one.loss) for one in seen], [float(one.grad_norm) for one in seen], dict(model.named_parameters())


def test_two_processes_learn_what_one_learns(data, tmp_path):
    configs = {}
    for kind, cut in PAIRS:
        module = changed(data, **CUTS[cut])
        configs[f"{kind}-{cut}"] = replace(module.config, parallel=KINDS[kind])
    found = run_fits(tmp_path, data, configs)
    for kind, cut in PAIRS:
        losses, norms, weights = alone(data, cut)
        name, run = f"{kind}-{cut}", found[f"{kind}-{cut}"]
        assert len(losses) >= STEPS
        assert run.losses == pytest.approx(losses, rel=LOSS), name
        assert max(norms) > data.config.optim.grad_clip > 0
        assert run.norms == pytest.approx(norms, rel=NORM), name
        exported = load_file(run.model / "model.safetensors")
        for weight, tensor in exported.items():
            torch.testing.assert_close(tensor, weights[weight].detach(), rtol=WEIGHT, atol=WEIGHT)
    loaded = AutoModelForCausalLM.from_pretrained(found["fsdp-accumulated"].model)
    is_tied = data.config.pivot.path.endswith("tied")
    assert loaded.config.tie_word_embeddings == is_tied
    assert ("lm_head.weight" in exported) != is_tied
