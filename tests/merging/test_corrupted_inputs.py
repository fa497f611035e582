"""Model folders that are damaged, forged or of another model: each is named with its file or tensor, nothing is
written, and all problems of a merge come in one message."""

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from merge_inputs import make_family, make_state, save_model
from safetensors.torch import load_file, save_file

from fusion.config import UserError
from fusion.merging import merge_folders

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
NORM = "model.norm.weight"
EMBEDDING = "model.embed_tokens.weight"
HEADER = 8


def truncate(model):
    path = model / FIRST
    path.write_bytes(path.read_bytes()[:-5])


def cut_the_header(model):
    path = model / FIRST
    path.write_bytes(path.read_bytes()[:60])


def empty_file(model):
    (model / FIRST).write_bytes(b"")


def five_bytes(model):
    path = model / FIRST
    path.write_bytes(path.read_bytes()[:5])


def garbage(model):
    path = model / FIRST
    content = bytearray(path.read_bytes())
    content[HEADER : HEADER + 40] = bytes(range(150, 190))
    path.write_bytes(content)


def endless_header(model):
    path = model / FIRST
    path.write_bytes((1 << 62).to_bytes(8, "little") + path.read_bytes()[HEADER:])


def deeply_nested(model):
    (model / FIRST).write_bytes((200_000).to_bytes(8, "little") + b"[" * 200_000)


def in_header(old, new):
    def replace(model):
        path = model / FIRST
        content = path.read_bytes()
        assert old in content
        path.write_bytes(content.replace(old, new, 1))

    return replace


def overlap(model):
    """The second tensor of the file begins within the first one."""
    path = model / FIRST
    content = path.read_bytes()
    length = int.from_bytes(content[:HEADER], "little")
    header = json.loads(content[HEADER : HEADER + length])
    second = max((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"])
    start, stop = header[second]["data_offsets"]
    header[second]["data_offsets"] = [start - 4, stop - 4]
    path.write_bytes(
        content[:HEADER] + json.dumps(header, separators=(",", ":")).encode().ljust(length) + b"\0" * stop
    )


def change(edit):
    """Change the tensors of the file that holds the norm, and save them anew."""

    def changed(model):
        state = load_file(model / SECOND)
        edit(state)
        save_file(state, model / SECOND)
        index = json.loads((model / INDEX).read_text())
        kept = {name: shard for name, shard in index["weight_map"].items() if shard == FIRST}
        (model / INDEX).write_text(json.dumps({"weight_map": kept | dict.fromkeys(state, SECOND)}))

    return changed


def drop_norm(state):
    del state[NORM]


def add_bias(state):
    state["model.norm.bias"] = state[NORM].clone()


def other_dtype(state):
    state[NORM] = state[NORM].half()


def other_shape(state):
    state[NORM] = state[NORM][:5].clone()


def nan(state):
    state[NORM][2] = float("nan")


def infinite(state):
    state[NORM][2] = float("inf")


def eight_bits(state):
    state[NORM] = state[NORM].to(torch.float8_e4m3fn)


def in_both_files(model):
    state = load_file(model / SECOND)
    save_file({EMBEDDING: load_file(model / FIRST)[EMBEDDING], **state}, model / SECOND)


def shard_missing(model):
    (model / SECOND).unlink()


def point_to(shard):
    def pointed(model):
        index = json.loads((model / INDEX).read_text())
        index["weight_map"][NORM] = shard
        (model / INDEX).write_text(json.dumps(index))

    return pointed


def link_out(name):
    def linked(model):
        outside = model.parent / f"secret of {model.name} {name}"
        shutil.move(model / name, outside)
        (model / name).symlink_to(outside)

    return linked


def ghost(model):
    index = json.loads((model / INDEX).read_text())
    index["weight_map"]["ghost"] = FIRST
    (model / INDEX).write_text(json.dumps(index))


def unlisted(model):
    index = json.loads((model / INDEX).read_text())
    del index["weight_map"][NORM]
    (model / INDEX).write_text(json.dumps(index))


def listed_index(model):
    (model / INDEX).write_text("[]")


def broken_index(model):
    (model / INDEX).write_text('{"weight_map": [')


def no_index(model):
    (model / INDEX).unlink()


def pickled(model):
    for path in [*model.glob("*.safetensors"), model / INDEX]:
        path.unlink()
    (model / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def no_weights(model):
    for path in [*model.glob("*.safetensors"), model / INDEX]:
        path.unlink()


def configured(**settings):
    def changed(model):
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, **settings}))

    return changed


def broken_config(model):
    (model / "config.json").write_bytes(b'{"model_type": "\xff\xfe')


def half_a_config(model):
    (model / "config.json").write_text("{")


def half_a_tokenizer(model):
    (model / "tokenizer.json").write_text('{"model": {"vocab"')


def listed_config(model):
    (model / "config.json").write_text("[]")


def more_tokens(model):
    state = load_file(model / FIRST)
    state[EMBEDDING] = torch.cat([state[EMBEDDING], state[EMBEDDING][:2]])
    save_file(state, model / FIRST)


def gone(model):
    shutil.rmtree(model)


Damage = namedtuple("Damage", "do says")
DAMAGES = {
    "truncated shard": Damage(truncate, [FIRST, "truncated"]),
    "cut header": Damage(cut_the_header, [FIRST, "truncated within its header"]),
    "empty file": Damage(empty_file, [FIRST, "not a safetensors file"]),
    "five bytes": Damage(five_bytes, [FIRST, "not a safetensors file"]),
    "garbage in the header": Damage(garbage, [FIRST, "the header is corrupt"]),
    "endless header": Damage(endless_header, [FIRST, "not a safetensors file"]),
    "nested header": Damage(deeply_nested, [FIRST, "the header is corrupt"]),
    "a header that is no object": Damage(in_header(b'{"', b'["'), [FIRST, "the header is corrupt"]),
    "unknown type of tensor": Damage(in_header(b'"dtype":"BF16"', b'"dtype":"XX16"'), [FIRST, "unknown tensor type"]),
    "negative size": Damage(in_header(b'"shape":[11,6]', b'"shape":[-1,6]'), [FIRST, "the header is corrupt"]),
    "wrong size": Damage(in_header(b'"shape":[11,6]', b'"shape":[11,7]'), [FIRST, f"offsets of '{EMBEDDING}'"]),
    "a gap": Damage(in_header(b'"data_offsets":[0,', b'"data_offsets":[2,'), [FIRST, f"offsets of '{EMBEDDING}'"]),
    "overlapping offsets": Damage(overlap, [FIRST, "the offsets of", "corrupt"]),
    "missing tensor": Damage(change(drop_norm), [f"'{NORM}' of base", "is missing"]),
    "extra tensor": Damage(change(add_bias), ["'model.norm.bias' is not in base"]),
    "other dtype": Damage(change(other_dtype), [f"'{NORM}' is float16 [6], but bfloat16 [6]"]),
    "other shape": Damage(change(other_shape), [f"'{NORM}' is bfloat16 [5], but bfloat16 [6]"]),
    "8 bits": Damage(change(eight_bits), [f"'{NORM}' is float8_e4m3fn [6], but bfloat16 [6]"]),
    "NaN": Damage(change(nan), [f"'{NORM}' holds NaN or infinities"]),
    "infinity": Damage(change(infinite), [f"'{NORM}' holds NaN or infinities"]),
    "one tensor in two files": Damage(in_both_files, [INDEX, EMBEDDING, f"in several files ({FIRST}, {SECOND})"]),
    "a file that the index names is missing": Damage(shard_missing, [SECOND, f"missing, but {INDEX} lists"]),
    "an index to the folder above": Damage(point_to("../base/model.safetensors"), [INDEX, "'../base/model.saf"]),
    "an index to an absolute path": Damage(
        point_to("/etc/passwd"), [INDEX, "'/etc/passwd' is not the name of a file"]
    ),
    "an index with backslashes": Damage(point_to("..\\a.safetensors"), [INDEX, "is not the name of a file"]),
    "an index to a folder": Damage(point_to(".."), [INDEX, "'..' is not the name of a file"]),
    "weights that are a link out": Damage(link_out(FIRST), [FIRST, "a link to", "outside of the model's folder"]),
    "a config that is a link out": Damage(link_out("config.json"), ["config.json: a link to", "outside"]),
    "an index that lists too much": Damage(ghost, [INDEX, f"'ghost' is not in {FIRST}"]),
    "an index that lists too little": Damage(unlisted, [INDEX, f"'{NORM}' in {SECOND} is not listed"]),
    "an index that is a list": Damage(listed_index, [INDEX, "not a safetensors index"]),
    "a broken index": Damage(broken_index, [INDEX, "not a safetensors index"]),
    "files without an index": Damage(no_index, ["several safetensors files", "add the index"]),
    "pickled weights": Damage(pickled, ["pytorch_model.bin", "which can run code", "refused"]),
    "no weights": Damage(no_weights, ["no safetensors weights"]),
    "other architecture": Damage(configured(model_type="mistral"), ["model_type is mistral, but llama in base"]),
    "broken config": Damage(broken_config, ["config.json: not JSON"]),
    "half a config": Damage(half_a_config, ["config.json: not JSON"]),
    "a config that is a list": Damage(listed_config, ["config.json: must hold a JSON object"]),
    "half a tokeniser": Damage(half_a_tokenizer, ["tokenizer.json: not JSON"]),
    "other vocabulary": Damage(more_tokens, [EMBEDDING, "13", "11"]),
    "no folder": Damage(gone, ["no such folder"]),
}
LATE = ("NaN", "infinity")
"""Found while tensors are read."""


def family(root: Path, names: list[str]) -> tuple[Path, list[Path]]:
    """A base, and a target in two shards for every name."""
    base, (target,) = make_family(1, torch.bfloat16)
    folders = [save_model(root / name, target, num_shards=2) for name in names]
    return save_model(root / "base", base), folders


def problems_of(base: Path | None, targets: list[Path], root: Path) -> list[str]:
    before = sorted(root.rglob("*"))
    with pytest.raises(UserError) as caught:
        merge_folders("linear", base, targets, root / "run" / "model")
    assert sorted(path for path in root.rglob("*") if path != root / "run") == before
    return caught.value.problems


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named_and_nothing_written(name, tmp_path):
    base, targets = family(tmp_path, ["good", name])
    DAMAGES[name].do(targets[1])
    problems = problems_of(base, targets, tmp_path)
    (problem,) = [one for one in problems if all(part in one for part in DAMAGES[name].says)]
    assert problem.startswith("target 1")
    assert str(targets[1]) in problem
    assert len(problem) < 1000
    assert not any("target 0" in one for one in problems)


@pytest.mark.parametrize("late", [False, True])
def test_all_damages_of_one_merge_come_together(late, tmp_path):
    names = [name for name in DAMAGES if (name in LATE) == late]
    base, targets = family(tmp_path, names)
    for name, target in zip(names, targets, strict=True):
        DAMAGES[name].do(target)
    problems = problems_of(base, targets, tmp_path)
    for place, name in enumerate(names):
        own = [problem for problem in problems if problem.startswith((f"target {place}:", f"target {place} "))]
        assert any(all(part in problem for part in DAMAGES[name].says) for problem in own), name


def test_all_tensors_with_nan_are_named_at_once(tmp_path):
    base, targets = family(tmp_path, ["a", "b"])
    change(nan)(targets[0])
    state = load_file(targets[1] / FIRST)
    state[EMBEDDING][3, 1] = float("-inf")
    save_file(state, targets[1] / FIRST)
    problems = problems_of(base, targets, tmp_path)
    assert len(problems) == 2
    assert problems[0].startswith(f"target 0 ({targets[0]}): '{NORM}' holds NaN")
    assert problems[1].startswith(f"target 1 ({targets[1]}): '{EMBEDDING}' holds NaN")


def test_a_disk_without_room(tmp_path, monkeypatch):
    base, targets = family(tmp_path, ["a"])
    usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 100))
    (problem,) = problems_of(base, targets, tmp_path)
    assert f"{tmp_path / 'run' / 'model'}: the merged model takes" in problem
    assert "free some, or choose another" in problem


def test_the_base_and_the_only_input_are_checked_too(tmp_path):
    base, targets = family(tmp_path, ["a"])
    truncate(targets[0])
    (base / "model.safetensors").write_bytes(b"\0" * 100)
    problems = problems_of(base, targets, tmp_path)
    assert [problem.split(":")[0] for problem in problems] == ["base", "target 0"]
    assert len(problems_of(None, targets, tmp_path)) == 1


def test_links_into_a_hub_cache_are_read(tmp_path):
    """The hub's cache keeps a model's files in blobs, and links to them in snapshots."""
    base, (target,) = family(tmp_path, ["a"])
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "1234"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for place, path in enumerate(sorted(target.iterdir())):
        shutil.copy(path, blobs / str(place))
        (snapshot / path.name).symlink_to(f"../../blobs/{place}")
    merge_folders("linear", base, [snapshot], tmp_path / "from_cache")
    merge_folders("linear", base, [target], tmp_path / "from_folder")
    for path in (tmp_path / "from_folder").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "from_cache" / path.name).read_bytes()


def test_a_quantized_base(tmp_path):
    state = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in make_state(0).items()}
    base = save_model(tmp_path / "base", state)
    assert "holds quantized tensors (torch.float8_e4m3fn)" in problems_of(None, [base], tmp_path)[0]
