"""Model folders: what is written, what is refused, and that nothing half-written is ever seen."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from merge_inputs import make_family, make_state, save_model
from safetensors.torch import load_file

from fusion.config import UserError
from fusion.merging import MergedDelta, TensorDeltas, merge_folders, merge_method, merge_state_dicts
from fusion.merging.checkpoints.checkpoint import open_checkpoint
from fusion.merging.checkpoints.tensor_file import DTYPES, TensorFile

Family = tuple[Path, list[Path]]
HERE = Path(__file__).parent


@merge_method(paper="https://example.org")
def die_at_the_third(deltas: TensorDeltas) -> MergedDelta:
    if "layers.1" in deltas.name:
        os.kill(os.getpid(), signal.SIGKILL)
    return MergedDelta(lambda block: block.deltas_JN[0], torch.zeros(deltas.num_targets))


def problems_of(
    base: Path | None, targets: list[Path], out: Path, method: str = "linear", **parameters: object
) -> str:
    with pytest.raises(UserError) as caught:
        merge_folders(method, base, targets, out, **parameters)
    assert not out.exists()
    assert not list(out.parent.glob(".*"))
    return "\n".join(caught.value.problems)


@pytest.mark.parametrize("num_shards", [1, 3])
def test_a_merged_folder_holds_what_the_state_dicts_give(tmp_path: Path, num_shards: int) -> None:
    base, targets = make_family(2, torch.bfloat16)
    extra = {"steps": torch.arange(3), "none": torch.zeros(0, 2), "scalar": torch.tensor(0.5)}
    base, targets = {**base, **extra}, [{**target, **extra} for target in targets]
    base_folder = save_model(tmp_path / "base", base, num_shards=num_shards)
    folders = [save_model(tmp_path / f"t{j}", target, num_shards=j + 1) for j, target in enumerate(targets)]
    out = tmp_path / "run" / "model"
    report = merge_folders("sce_released", base_folder, folders, out, scale=1.5, tau=0.3)

    merged = {name: tensor for path in out.glob("*.safetensors") for name, tensor in load_file(path).items()}
    expected = merge_state_dicts("sce_released", base, targets, scale=1.5, tau=0.3)
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], expected[name]) for name in expected)
    names = {path.name for path in out.iterdir()}
    assert names == {path.name for path in base_folder.iterdir()} | {"manifest.json", "README.md"}
    assert list((tmp_path / "run").iterdir()) == [out]
    listed = json.loads((out / "manifest.json").read_text())["outputs"]
    assert report.bytes_written == sum((out / name).stat().st_size for name in listed)
    assert report.seconds > 0
    assert report.scale == 1.5


def test_the_base_s_tokenizer_comes_along_but_not_its_code_and_card(family: Family, tmp_path: Path) -> None:
    merge_folders("linear", family[0], family[1], tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "chat_template.jinja", "generation_config.json", "config.json"} <= names
    assert "modeling_evil.py" not in names
    assert "the base's card" not in (tmp_path / "out" / "README.md").read_text()


def test_without_a_base_the_first_target_gives_the_rest(family: Family, tmp_path: Path) -> None:
    merge_folders("linear", None, [family[0], family[1][0]], tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_the_same_merge_gives_the_same_bytes(family: Family, tmp_path: Path) -> None:
    for name in ("a", "b"):
        merge_folders("dare_linear", family[0], family[1], tmp_path / name, seed=4)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_the_manifest_names_everything(family: Family, tmp_path: Path) -> None:
    merge_folders("ties", family[0], family[1], tmp_path / "out", scale=2, seed=3, density=0.5)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["parameters"] == {"density": 0.5, "weight": 0.2, "normalize": True, "trim": "tensor"}
    assert (manifest["method"], manifest["scale"], manifest["seed"]) == ("ties", 2.0, 3)
    assert [manifest["inputs"][f"target {j}"]["folder"] for j in range(3)] == [str(folder) for folder in family[1]]
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= manifest["inputs"]["base"]["files"].keys()
    assert manifest["outputs"].keys() == {p.name for p in (tmp_path / "out").iterdir()} - {
        "manifest.json",
        "README.md",
    }


def test_an_empty_output_folder_is_filled_and_a_full_one_refused(family: Family, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    merge_folders("linear", family[0], family[1], out)
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="exists and is not empty"):
        merge_folders("sce", family[0], family[1], out)
    assert (out / "model.safetensors").read_bytes() == before


def test_all_problems_come_before_the_first_byte(family: Family, tmp_path: Path) -> None:
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "pytorch_model.bin").write_bytes(b"x")
    empty = tmp_path / "empty"
    empty.mkdir()
    other = make_state(1)
    del other["model.norm.weight"]
    misfit = save_model(tmp_path / "misfit", other, model_type="mistral")
    text = problems_of(family[0], [tmp_path / "none", pickled, empty, misfit], tmp_path / "out", weigth=1.0)
    assert "no parameter 'weigth': did you mean 'weight'?" in text
    assert f"target 0: {tmp_path / 'none'}: no such folder" in text
    assert f"target 3 ({misfit}): model_type is mistral" in text
    assert f"target 3 ({misfit}): 'model.norm.weight' of base ({family[0]}) is missing" in text
    assert f"target 3 ({misfit}): 'model.layers.0.mlp.weight' is float32 [9, 6], but bfloat16 [9, 6]" in text
    assert "holds pickled weights (pytorch_model.bin), which can run code" in text
    assert "empty: no safetensors weights" in text


def test_wrong_number_of_weights(family: Family, tmp_path: Path) -> None:
    assert "lists 2 numbers for 3 targets" in problems_of(*family, tmp_path / "out", weight=[1.0, 2.0])
    assert "at least one target" in problems_of(family[0], [], tmp_path / "out")


def test_a_kill_between_two_tensors_leaves_nothing_visible_and_the_next_merge_works(
    family: Family, tmp_path: Path
) -> None:
    base, targets = family
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path;"
        "from fusion.merging import merge_folders;"
        "base, *targets, out = map(Path, sys.argv[2:]);"
        "merge_folders('test_merge_folders.die_at_the_third', base, targets, out)"
    )
    out = tmp_path / "run" / "model"
    killed = subprocess.run([sys.executable, "-c", code, HERE, base, *targets, out], cwd=HERE.parents[1], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    assert [path.name for path in out.parent.iterdir()] == [".model.merging"]
    merge_folders("linear", base, targets, out)
    assert [path.name for path in out.parent.iterdir()] == ["model"]
    assert not list(out.glob(".*"))


def test_two_merges_into_one_folder_do_not_mix(family: Family, tmp_path: Path) -> None:
    from filelock import FileLock

    working = tmp_path / ".out.merging"
    working.mkdir()
    with FileLock(working / ".lock"), pytest.raises(UserError, match="another process is merging into it"):
        merge_folders("linear", *family, tmp_path / "out")


def test_a_checkpoint_reads_every_type_of_tensor(tmp_path: Path) -> None:
    state = {key: torch.arange(6).reshape(2, 3).to(dtype) for key, dtype in DTYPES.items()}
    state |= {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 2)}
    checkpoint = open_checkpoint(save_model(tmp_path / "m", state))
    assert checkpoint.keys() == state.keys()
    for name, tensor in state.items():
        assert checkpoint[name].dtype == tensor.dtype
        assert checkpoint[name].shape == tensor.shape
        assert checkpoint[name].tolist() == tensor.tolist()


def test_asking_for_a_tensor_s_name_reads_no_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(save_model(tmp_path / "model", make_state(0)))
    names = list(checkpoint)
    monkeypatch.setattr(TensorFile, "read_span", None)
    assert all(name in checkpoint for name in names)
    assert "lm_head" not in checkpoint


def test_transformers_loads_a_merged_model(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    folders = []
    for seed in range(3):
        torch.manual_seed(seed)
        folders.append(tmp_path / f"m{seed}")
        transformers.LlamaForCausalLM(config).save_pretrained(folders[-1])
    merge_folders("sce", folders[0], folders[1:], tmp_path / "out")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(merged.lm_head.weight, weights["model.embed_tokens.weight"])
    assert torch.isfinite(merged(torch.arange(5)[None]).logits).all()
