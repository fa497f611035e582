"""What makes merged weights a model that others load: tied heads, shards, the card."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from merge_inputs import make_family, save_model
from safetensors.torch import load_file, save_file
from tiny_models import make_llama, make_qwen, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusion.config import UserError
from fusion.config.schema import EngineConfig
from fusion.merging import merge_folders
from fusion.merging.checkpoints import output as output_module
from fusion.merging.checkpoints.card import Ancestor, Provenance, write_card
from fusion.merging.checkpoints.manifest import differences
from fusion.merging.checkpoints.tensor_file import TensorSpec, new_tensor_file, open_tensor_file
from fusion.merging.inputs import Inputs
from fusion.merging.verify import main as verify

MERGEKIT = os.environ.get("FUSION_MERGEKIT_PYTHON")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def engine(shard_size: str = "5GB", **settings) -> EngineConfig:
    return EngineConfig(**{"threads": 1, "probe_disk": False, **settings}, shard_size=shard_size)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def problems_of(base, targets, out, **settings) -> list[str]:
    with pytest.raises(UserError) as caught:
        merge_folders("linear", base, targets, out, **{"engine": engine(), **settings})
    assert not out.exists()
    return caught.value.problems


@pytest.fixture(scope="module")
def llamas(tmp_path_factory) -> list[Path]:
    """A base and two targets with a tokeniser."""
    root = tmp_path_factory.mktemp("llamas")
    tokenizer = make_tokenizer("byte_level", "chatml")
    for seed in range(3):
        make_llama(len(tokenizer), seed=seed).to(torch.bfloat16).save_pretrained(root / str(seed))
        tokenizer.save_pretrained(root / str(seed))
    return [root / str(seed) for seed in range(3)]


class TestTiedHeads:
    def save(self, folder: Path, seed: int, *, head: float | None = None, tied: bool = True) -> Path:
        """A tied model that stores, where `head` is given, so many times its embedding as head."""
        model = make_qwen(40, seed=seed)
        model.config.tie_word_embeddings = tied
        model.save_pretrained(folder)
        if head is not None:
            state = load_file(folder / "model.safetensors")
            state[HEAD] = head * state[EMBEDDING]
            save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    @pytest.mark.parametrize("copied", [{"base"}, {"target"}, {"base", "target"}], ids="-".join)
    @pytest.mark.parametrize("method", ["task_arithmetic", "dare_linear"])
    def test_a_copy_of_the_embedding_is_no_head(self, tmp_path, copied, method):
        folders = {}
        for seed, name in enumerate(("base", "target")):
            folders[name] = self.save(tmp_path / name, seed, head=1.0 if name in copied else None)
            self.save(tmp_path / f"plain_{name}", seed)
        merge_folders(method, folders["base"], [folders["target"]], tmp_path / "out", engine=engine())
        plain = tmp_path / "plain_base", [tmp_path / "plain_target"]
        merge_folders(method, *plain, tmp_path / "expected", engine=engine())
        found, expected = weights(tmp_path / "out"), weights(tmp_path / "expected")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert differences(tmp_path / "out" / "manifest.json")[1] == []

    def test_a_base_that_says_it_is_not_tied_becomes_tied(self, tmp_path):
        base, target = self.save(tmp_path / "base", 0, head=1.0, tied=False), self.save(tmp_path / "target", 1)
        merge_folders("linear", base, [target], tmp_path / "out", engine=engine())
        assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert torch.equal(model.lm_head.weight, weights(tmp_path / "out")[EMBEDDING])

    def test_a_head_of_its_own_beside_tied_ones_is_refused(self, tmp_path):
        base, target = self.save(tmp_path / "base", 0), self.save(tmp_path / "target", 1, head=2.0)
        problems = problems_of(base, [target], tmp_path / "out")
        assert (
            f"target 0 ({target}): '{HEAD}' is not its embedding, but base ({base}) stores no head, so that its head "
            "is its embedding: save both models alike"
        ) in problems

    def test_untied_models_keep_their_heads(self, tmp_path):
        folders = [self.save(tmp_path / str(seed), seed, head=1.0, tied=False) for seed in range(2)]
        merge_folders("linear", None, folders, tmp_path / "out", engine=engine())
        assert HEAD in weights(tmp_path / "out")


class TestShards:
    def test_the_weights_fill_shards_of_the_wanted_size(self, llamas, tmp_path):
        base, *targets = llamas
        for name, size in {"one": "5GB", "many": "8KiB"}.items():
            merge_folders("dare_linear", base, targets, tmp_path / name, engine=engine(size), seed=3)
        index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
        files = sorted((tmp_path / "many").glob("*.safetensors"))
        assert [path.name for path in files] == sorted(set(index["weight_map"].values()))
        assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
        assert len(files) > 3
        for path in files:
            held = load_file(path)
            assert all(index["weight_map"][name] == path.name for name in held)
            assert sum(tensor.nbytes for tensor in held.values()) <= 8192 or len(held) == 1
        whole, sharded = weights(tmp_path / "one"), weights(tmp_path / "many")
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
        assert whole.keys() == sharded.keys()
        assert all(torch.equal(whole[name], sharded[name]) for name in whole)
        assert not (tmp_path / "one" / "model.safetensors.index.json").exists()
        assert verify([str(tmp_path / "many")]) == 0
        files[1].write_bytes(files[1].read_bytes()[:-1] + b"!")
        assert verify([str(tmp_path / "many")]) == 2

    def test_transformers_loads_shards_and_generates(self, llamas, tmp_path):
        base, *targets = llamas
        merge_folders("linear", base, targets, tmp_path / "out", engine=engine("8KiB"))
        model, tokenizer = (one.from_pretrained(tmp_path / "out") for one in (AutoModelForCausalLM, AutoTokenizer))
        ids = torch.tensor([tokenizer.encode("The ratio of poles")])
        assert torch.isfinite(model(ids).logits).all()
        assert model.generate(ids, max_new_tokens=4, do_sample=False).shape[1] > ids.shape[1]
        assert all(torch.equal(model.state_dict()[name], one) for name, one in weights(tmp_path / "out").items())

    def test_files_that_are_small_enough_stay_as_they_are(self, tmp_path):
        base, targets = make_family(1, torch.bfloat16)
        folder, target = save_model(tmp_path / "base", base, num_shards=3), save_model(tmp_path / "t", targets[0])
        merge_folders("linear", folder, [target], tmp_path / "out", engine=engine("4KiB"))
        assert {path.name for path in folder.iterdir()} <= {path.name for path in (tmp_path / "out").iterdir()}
        name = "model.safetensors.index.json"
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()

    def test_shards_of_mixed_types_have_right_checksums(self, tmp_path, monkeypatch):
        """Wide types come first where tensors would lie across: the file is then not written from front to back."""
        monkeypatch.setattr("fusion.merging.checkpoints.digests.STEP", 1)
        generator = torch.Generator().manual_seed(0)
        shapes = {"a": (3, 3), "b": (5, 5), "c": (6,), "d": (300, 3)}
        dtypes = {"a": torch.bfloat16, "b": torch.float32, "c": torch.bfloat16, "d": torch.float32}

        def state() -> dict[str, torch.Tensor]:
            return {name: torch.randn(shape, generator=generator).to(dtypes[name]) for name, shape in shapes.items()}

        folders = [save_model(tmp_path / str(j), state(), num_shards=2) for j in range(2)]
        merge_folders("linear", folders[0], folders[1:], tmp_path / "whole", engine=engine())
        merge_folders("linear", folders[0], folders[1:], tmp_path / "out", engine=engine("1KiB", threads=2))
        assert list(open_tensor_file(tmp_path / "out" / "model-00001-of-00002.safetensors").specs) == ["b", "a", "c"]
        assert differences(tmp_path / "out" / "manifest.json")[1] == []
        found, expected = weights(tmp_path / "out"), weights(tmp_path / "whole")
        assert all(torch.equal(found[name], expected[name]) for name in expected)

    def test_a_new_file_keeps_its_order_where_it_can(self, tmp_path):
        specs = {"z": TensorSpec(torch.bfloat16, (2, 2)), "a": TensorSpec(torch.float32, (3,))}
        assert list(new_tensor_file(tmp_path / "f", specs).specs) == ["z", "a"]

    def test_shards_go_on_only_with_shards_of_the_same_size(self, llamas, tmp_path, monkeypatch):
        base, *targets = llamas

        class StopError(Exception):
            pass

        def stop(self, group):
            commit(self, group)
            raise StopError

        commit = output_module.Output._commit
        monkeypatch.setattr(output_module, "COMMIT_BYTES", 8000)
        resumed = {}
        for size in ("8KiB", "16KiB"):
            out = tmp_path / size
            with monkeypatch.context() as patch:
                patch.setattr(output_module.Output, "_commit", stop)
                with pytest.raises(StopError):
                    merge_folders("ties", base, targets, out, engine=engine("8KiB"))
            resumed[size] = merge_folders("ties", base, targets, out, engine=engine(size)).resumed
            assert verify([str(out)]) == 0
        assert resumed["8KiB"] > 0
        assert resumed["16KiB"] == 0
        merge_folders("ties", base, targets, tmp_path / "whole", engine=engine("8KiB"))
        for path in (tmp_path / "whole").iterdir():
            assert path.read_bytes() == (tmp_path / "8KiB" / path.name).read_bytes()

    def test_a_wrong_size_comes_with_the_other_problems(self, llamas, tmp_path):
        problems = problems_of(
            llamas[0], llamas[1:], tmp_path / "out", engine=engine("5 apples"), vocabulary="onion", weigth=1
        )
        assert any(problem.startswith("engine.shard_size: '5 apples' is no size") for problem in problems)
        assert any(problem.startswith("vocabulary=onion") for problem in problems)
        assert any("weigth" in problem for problem in problems)


class TestCard:
    @pytest.fixture
    def merged(self, llamas, tmp_path):
        base, *targets = llamas
        weight = {"*mlp*": [0.5, 1.0], "*": 0.25}
        settings = {"weight": weight, "scale": 1.5, "engine": engine()}
        report = merge_folders("task_arithmetic", base, targets, tmp_path / "out", **settings)
        return tmp_path / "out", report

    def test_formula_parameters_and_coefficients(self, merged, llamas):
        folder, report = merged
        card = (folder / "README.md").read_text()
        assert "`merged = base + 1.5 * the merged delta, where d_j = target j - base`" in card
        assert "sum_j w_j d_j" in card
        assert "<https://arxiv.org/abs/2212.04089>" in card
        assert '| weight | `{"*mlp*": [0.5, 1.0], "*": 0.25}` |' in card
        assert f"| all | {' | '.join(f'{one:.4g}' for one in report.mean_coefficients)} |" in card
        assert f"| `{EMBEDDING}` | 0.25 | 0.25 |" in card
        sizes = {name: one["elements"] for name, one in report.tensors.items() if name.startswith("model.layers.1.")}
        mlp = sum(size for name, size in sizes.items() if "mlp" in name) / sum(sizes.values())
        means = [0.25 + mlp * (weight - 0.25) for weight in (0.5, 1.0)]
        assert f"| `model.layers.1` | {means[0]:.4g} | {means[1]:.4g} |" in card
        for folder in llamas:
            assert f"`{folder}`" in card

    def test_the_hub_can_read_its_front(self, merged):
        front = yaml.safe_load((merged[0] / "README.md").read_text().split("---\n")[1])
        assert front == {
            "library_name": "transformers",
            "tags": ["merge", "fusion"],
            "base_model": ["0", "1", "2"],
            "base_model_relation": "merge",
        }

    def test_models_of_the_hub_go_by_their_ids(self):
        snapshot = "/cache/hub/models--Qwen--Qwen2.5-0.5B/snapshots/abc"
        assert Ancestor("pivot", snapshot).hub_id == "Qwen/Qwen2.5-0.5B"
        assert Ancestor("pivot", "meta-llama/Llama-3.2-1B").hub_id == "meta-llama/Llama-3.2-1B"
        assert Ancestor("my model!", "/models/mine").hub_id == "my-model"

    def test_its_command_makes_the_model_again(self, merged, tmp_path):
        command = (merged[0] / "README.md").read_text().split('```sh\npython -c "')[1].split('"\n```')[0]
        exec(command.replace("'OUT'", repr(str(tmp_path / "again"))))
        for path in merged[0].iterdir():
            assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()

    def test_scores_come_later_and_the_folder_stays_verified(self, merged):
        folder, report = merged
        base, targets = Ancestor("pivot", "org/pivot"), [Ancestor(name, f"org/{name}", "teacher") for name in "ab"]
        scores = [("pivot pivot", {"skill": 0.25}), ("merged task_arithmetic", {"skill": 0.5, "NLL per byte": None})]
        write_card(folder, report, Provenance(base, targets, "python merge.py seed=7", scores))
        card = (folder / "README.md").read_text()
        assert "| merged task_arithmetic | 0.5 |  |" in card
        assert "| target | a | `org/a` | teacher |" in card
        assert "```sh\npython merge.py seed=7\n```" in card
        assert "README.md" not in json.loads((folder / "manifest.json").read_text())["outputs"]
        assert verify([str(folder)]) == 0


@pytest.mark.skipif(not MERGEKIT, reason="FUSION_MERGEKIT_PYTHON names no Python that has mergekit")
@pytest.mark.parametrize("shard_size", ["5GB", "8KiB"])
def test_mergekit_takes_merged_models(llamas, tmp_path, shard_size):
    base, *targets = llamas
    for name in ("one", "two"):
        weight = {"one": 0.5, "two": 0.2}[name]
        merge_folders("task_arithmetic", base, targets, tmp_path / name, engine=engine(shard_size), weight=weight)
    config = {
        "merge_method": "linear",
        "models": [{"model": str(tmp_path / name), "parameters": {"weight": 0.5}} for name in ("one", "two")],
        "dtype": "float32",
    }
    (tmp_path / "config.yml").write_text(yaml.safe_dump(config))
    run = [MERGEKIT, "-m", "mergekit.scripts.run_yaml", str(tmp_path / "config.yml"), str(tmp_path / "theirs")]
    subprocess.run(run, check=True, cwd=tmp_path, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    theirs, (one, two) = weights(tmp_path / "theirs"), (weights(tmp_path / name) for name in ("one", "two"))
    assert theirs.keys() == one.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(tensor, (one[name].float() + two[name].float()) / 2, rtol=1e-5, atol=1e-6)
    AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")


def test_a_merged_model_is_an_input_again(llamas, tmp_path):
    base, *targets = llamas
    merge_folders("linear", base, targets, tmp_path / "once", engine=engine("8KiB"))
    merge_folders("linear", base, [tmp_path / "once"], tmp_path / "twice", engine=engine())
    once, twice = weights(tmp_path / "once"), weights(tmp_path / "twice")
    assert all(torch.equal(once[name], twice[name]) for name in once)
    assert Inputs.open(base, [tmp_path / "twice"]).targets[0].keys() == once.keys()
