"""Models with other tokens than the base's, in the tokens of all or of those they share; tokenisers fit the rows."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_models import CORPUS, make_llama, make_qwen, make_tokenizer
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from fusion.config import UserError
from fusion.config.schema import EngineConfig
from fusion.dialogues.token_bytes import token_bytes
from fusion.merging import merge_folders
from fusion.merging.checkpoints.manifest import differences
from fusion.merging.inputs import Inputs
from fusion.merging.vocabularies.token_rows import TokenRows

MERGEKIT = os.environ.get("FUSION_MERGEKIT_PYTHON")
ENGINE = EngineConfig(threads=1, probe_disk=False)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TEXTS = [*CORPUS[:3], "river the yes 北京", "<|im_start|>user\nThe ratio<|im_end|>"]


def edited(tokenizer: PreTrainedTokenizerFast, edit) -> PreTrainedTokenizerFast:
    """The tokeniser with its JSON changed by `edit`."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    edit(spec)
    names = {key: getattr(tokenizer, key) for key in ("bos_token", "eos_token", "pad_token")}
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)), **{key: name for key, name in names.items() if name}
    )
    made.chat_template = tokenizer.chat_template
    return made


def turned(spec: dict) -> None:
    """The same tokens in another order: special ones stay, the pieces are turned around."""
    vocab = spec["model"]["vocab"]
    special = {token["content"] for token in spec["added_tokens"]}
    free = sorted(token for piece, token in vocab.items() if piece not in special)
    pieces = [piece for piece in sorted(vocab, key=vocab.get) if piece not in special]
    vocab |= dict(zip(pieces, reversed(free), strict=True))


def with_merges(*pairs: tuple[str, str]):
    """Pieces made of two others, behind all others."""

    def edit(spec: dict) -> None:
        vocab = spec["model"]["vocab"]
        for first, second in pairs:
            vocab[first + second] = max(vocab.values()) + 1
            spec["model"]["merges"].append([first, second])

    return edit


def without_merges(count: int):
    """The last pieces and what they are made of go."""

    def edit(spec: dict) -> None:
        for first, second in spec["model"]["merges"][-count:]:
            del spec["model"]["vocab"][first + second]
        spec["model"]["merges"] = spec["model"]["merges"][:-count]

    return edit


def with_tokens(tokenizer: PreTrainedTokenizerFast, *tokens: str) -> PreTrainedTokenizerFast:
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    return tokenizer


def plain() -> PreTrainedTokenizerFast:
    return make_tokenizer("byte_level", "chatml")


def save(folder: Path, tokenizer, rows: int | None = None, seed: int = 0, make=make_llama) -> Path:
    model = make(rows or len(tokenizer), seed=seed)
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def rows_by_token(folder: Path, name: str) -> dict[bytes, torch.Tensor]:
    """What a token spells -> its row, byte pieces apart."""
    table = token_bytes(AutoTokenizer.from_pretrained(folder))
    tensor = weights(folder)[name]
    tokens = [token for token in range(min(len(table), len(tensor))) if token not in table.byte_pieces]
    return {table.literal(token): tensor[token] for token in tokens}


def merge(base, targets, out, vocabulary, method="task_arithmetic", **settings):
    return merge_folders(method, base, targets, out, vocabulary=vocabulary, engine=ENGINE, **settings)


def problems_of(base, targets, out, vocabulary, method="task_arithmetic") -> list[str]:
    with pytest.raises(UserError) as caught:
        merge(base, targets, out, vocabulary, method)
    assert not out.exists()
    assert not list(out.parent.glob(".*"))
    return caught.value.problems


def check_rows(base, targets, out, names=(EMBEDDING, HEAD), weight=0.3) -> set[bytes]:
    """Every row is task arithmetic on one token's rows, as the documentation says it."""
    for name in names:
        merged, base_rows = rows_by_token(out, name), rows_by_token(base, name)
        target_rows = [rows_by_token(target, name) for target in targets]
        for token, row in merged.items():
            having = [rows[token] for rows in target_rows if token in rows]
            origin = base_rows[token] if token in base_rows else torch.stack(having).double().mean(dim=0).float()
            wanted = origin + sum(weight * (one - origin) for one in having)
            torch.testing.assert_close(row, wanted, rtol=1e-5, atol=1e-6, msg=f"{name} {token}")
    return set(merged)


def generates(folder: Path, text: str = "The ratio") -> None:
    """transformers loads model and tokeniser, and they fit each other."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer.encode(text)])
    assert model.config.vocab_size == model.get_output_embeddings().weight.shape[0] >= len(tokenizer)
    assert torch.isfinite(model(ids).logits).all()
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1]


@pytest.fixture
def family(tmp_path):
    """A base, a target with two tokens more, and one whose pieces have other numbers, and other tokens more."""
    base = save(tmp_path / "base", plain(), seed=1)
    more = save(tmp_path / "more", with_tokens(plain(), "<tool>", "<image>"), seed=2)
    other = save(tmp_path / "other", with_tokens(edited(plain(), turned), "<image>", "<pause>"), rows=400, seed=3)
    return base, [more, other]


def test_error_sees_other_tokens_in_as_many_rows(tmp_path):
    base = save(tmp_path / "base", plain(), seed=1)
    other = save(tmp_path / "other", edited(plain(), turned), seed=2)
    (problem,) = problems_of(base, [other], tmp_path / "out", "error")
    ids = [token for token in range(2, len(plain())) if token != len(plain()) + 1 - token]
    first, last = plain().convert_ids_to_tokens([2, len(plain()) - 1])
    assert problem.startswith(
        f"target 0 ({other}): its tokeniser is not that of base ({base}): {len(ids):,} ids mean something else, such "
        f"as 2 is {json.dumps(last, ensure_ascii=False)}, and {json.dumps(first, ensure_ascii=False)} there; 3 is "
    )
    assert "vocabulary=base" in problem
    assert "union" in problem
    assert "intersect" in problem
    for mode in ("base", "union"):
        out = tmp_path / f"by_{mode}"
        merge(base, [other], out, mode)
        assert check_rows(base, [other], out) == set(rows_by_token(base, EMBEDDING))
        assert (out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_error_accepts_what_means_the_same(tmp_path):
    """Rewritten files, tokens in rows that the base does not use, and folders without a tokeniser."""
    base = save(tmp_path / "base", plain(), rows=384, seed=1)
    rewritten = save(tmp_path / "rewritten", plain(), rows=384, seed=2)
    file = rewritten / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text())))
    more = save(tmp_path / "more", with_tokens(plain(), "<tool>"), rows=384, seed=3)
    bare = save(tmp_path / "bare", plain(), rows=384, seed=4)
    for path in bare.glob("tokenizer*"):
        path.unlink()
    merge(base, [rewritten, more, bare], tmp_path / "out", "error")
    moved = save(tmp_path / "moved", with_tokens(edited(plain(), without_merges(1)), "<tool>"), rows=384, seed=5)
    (problem,) = problems_of(base, [moved], tmp_path / "none", "error")
    assert "1 ids mean something else, such as" in problem
    assert '"<tool>"' in problem


def test_union_has_the_tokens_of_all(family, tmp_path):
    base, targets = family
    report = merge(base, targets, tmp_path / "out", "union")
    tokens = check_rows(base, targets, tmp_path / "out")
    assert tokens == set(rows_by_token(base, EMBEDDING)) | {b"<tool>", b"<image>", b"<pause>"}
    tokenizer, rows = AutoTokenizer.from_pretrained(tmp_path / "out"), len(plain()) + 3
    assert tokenizer.convert_tokens_to_ids(["<tool>", "<image>", "<pause>"]) == [rows - 3, rows - 2, rows - 1]
    for text in TEXTS:
        assert tokenizer.encode(text) == plain().encode(text)
    assert tokenizer.encode("a<pause>b")[1] == rows - 1
    assert tokenizer.eos_token == plain().eos_token
    assert tokenizer.chat_template == plain().chat_template
    generates(tmp_path / "out", "The<pause> ratio")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["missing_rows"] == {"base": 3, "target 0": 1, "target 1": 1}
    assert (manifest["vocabulary"], manifest["new_tokens"]) == ("union", 3)
    assert report.num_elements == sum(tensor.numel() for tensor in weights(tmp_path / "out").values())
    assert differences(tmp_path / "out" / "manifest.json")[1] == []


def test_a_token_of_one_target_keeps_its_row(family, tmp_path):
    base, targets = family
    merge(base, targets, tmp_path / "out", "union", method="sce")
    merged, own = rows_by_token(tmp_path / "out", HEAD), rows_by_token(targets[0], HEAD)
    assert torch.equal(merged[b"<tool>"], own[b"<tool>"])


def test_intersect_has_what_all_have_and_the_base_s_special_tokens(family, tmp_path):
    base, targets = family
    smaller = save(tmp_path / "smaller", edited(plain(), without_merges(7)), seed=4)
    merge(base, [*targets, smaller], tmp_path / "out", "intersect")
    tokens = check_rows(base, [*targets, smaller], tmp_path / "out")
    assert tokens == set(rows_by_token(smaller, EMBEDDING))
    tokenizer, own = AutoTokenizer.from_pretrained(tmp_path / "out"), AutoTokenizer.from_pretrained(smaller)
    assert len(tokenizer) == len(weights(tmp_path / "out")[EMBEDDING]) == len(plain()) - 7
    for text in TEXTS:
        assert tokenizer.convert_ids_to_tokens(tokenizer.encode(text)) == own.convert_ids_to_tokens(own.encode(text))
        assert tokenizer.decode(tokenizer.encode(text)) == own.decode(own.encode(text))
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text())["eos_token_id"] == tokenizer.eos_token_id
    generates(tmp_path / "out")


def test_special_tokens_that_not_all_have_stay(tmp_path):
    """Their rows are the base's: the other model has no delta there. All ids move, in configs too."""
    base = save(tmp_path / "base", make_tokenizer("byte_level", "llama3"), seed=1)
    target = save(tmp_path / "target", edited(plain(), without_merges(3)), seed=2)
    merge(base, [target], tmp_path / "out", "intersect")
    check_rows(base, [target], tmp_path / "out")
    merged, before = rows_by_token(tmp_path / "out", HEAD), rows_by_token(base, HEAD)
    for token in (b"<|begin_of_text|>", b"<|eot_id|>"):
        assert torch.equal(merged[token], before[token])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.eos_token == "<|eot_id|>"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == tokenizer.eos_token_id
    generates(tmp_path / "out")


def test_union_of_pieces_keeps_how_the_base_reads_and_adds_merges(tmp_path):
    base = save(tmp_path / "base", with_tokens(plain(), "<tool>"), seed=1)
    target = save(tmp_path / "target", edited(plain(), with_merges(("q", "z"), ("qz", "z"))), seed=2)
    merge(base, [target], tmp_path / "out", "union")
    tokens = check_rows(base, [target], tmp_path / "out")
    assert tokens == set(rows_by_token(base, EMBEDDING)) | {b"qz", b"qzz"}
    tokenizer, before = AutoTokenizer.from_pretrained(tmp_path / "out"), AutoTokenizer.from_pretrained(base)
    for text in [*TEXTS, "<tool>the"]:
        assert tokenizer.encode(text) == before.encode(text)
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("qzz")) == ["qzz"]
    generates(tmp_path / "out", "qzz")


def test_other_kinds_of_tokenisers_are_united_only_in_added_tokens(tmp_path):
    base = save(tmp_path / "base", plain(), seed=1)
    target = save(tmp_path / "target", make_tokenizer("metaspace", "chatml"), seed=2)
    (problem,) = problems_of(base, [target], tmp_path / "out", "union")
    kind = type(AutoTokenizer.from_pretrained(base)).__name__
    assert problem.startswith(f"target 0 ({target}): its tokeniser ({kind}, BPE) has ")
    assert f"that the tokeniser of base ({base}) ({kind}, BPE) lacks" in problem
    assert "only BPE tokenisers that read text alike can be united: take vocabulary=base or intersect" in problem
    merge(base, [target], tmp_path / "common", "intersect")
    assert 200 < len(rows_by_token(tmp_path / "common", EMBEDDING)) < len(plain())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "common")
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == plain().decode(plain().encode(text))
    generates(tmp_path / "common")


def test_a_tokeniser_that_cannot_lose_pieces_is_refused(tmp_path):
    base = save(tmp_path / "base", edited(plain(), as_unigram), seed=1)
    target = save(tmp_path / "target", edited(plain(), without_merges(3)), seed=2)
    kind = type(AutoTokenizer.from_pretrained(base)).__name__
    assert problems_of(base, [target], tmp_path / "out", "intersect") == [
        f"base ({base}): its tokeniser ({kind}, Unigram) cannot lose pieces, only BPE can: take vocabulary=base or "
        "union"
    ]


def as_unigram(spec: dict) -> None:
    vocab = spec["model"]["vocab"]
    pieces = [[piece, -float(token)] for piece, token in sorted(vocab.items(), key=lambda item: item[1])]
    spec["model"] = {"type": "Unigram", "unk_id": None, "vocab": pieces, "byte_fallback": False}


def test_new_tokens_take_rows_that_are_not_used(tmp_path):
    base = save(tmp_path / "base", plain(), rows=384, seed=1)
    target = save(tmp_path / "target", with_tokens(plain(), "<tool>"), rows=448, seed=2)
    merge(base, [target], tmp_path / "out", "union")
    merged, before, own = (weights(folder)[EMBEDDING] for folder in (tmp_path / "out", base, target))
    used = len(plain())
    assert merged.shape == before.shape
    assert torch.equal(merged[used], own[used])
    assert torch.equal(merged[used + 1 :], before[used + 1 :])
    assert AutoTokenizer.from_pretrained(tmp_path / "out").convert_tokens_to_ids("<tool>") == used
    generates(tmp_path / "out")


def test_tied_heads_have_the_rows_of_the_embedding(tmp_path):
    known = "<|endoftext|>"  # transformers gives every Qwen tokeniser this one
    base = save(tmp_path / "base", with_tokens(plain(), known), seed=1, make=make_qwen)
    target = save(tmp_path / "target", with_tokens(plain(), known, "<tool>"), seed=2, make=make_qwen)
    merge(base, [target], tmp_path / "out", "union")
    check_rows(base, [target], tmp_path / "out", names=[EMBEDDING])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(model.lm_head.weight) == len(plain()) + 2
    generates(tmp_path / "out")


def test_without_a_base_the_first_target_is_it(family, tmp_path):
    base, targets = family
    merge(None, [base, *targets], tmp_path / "out", "union", method="linear")
    merged = rows_by_token(tmp_path / "out", EMBEDDING)
    sources = [rows_by_token(folder, EMBEDDING) for folder in (base, *targets)]
    for token in (b"<tool>", b"<image>", b"<pause>", b"e"):
        mean = torch.stack([rows[token] for rows in sources if token in rows]).mean(dim=0)
        torch.testing.assert_close(merged[token], mean, rtol=1e-5, atol=1e-6)


def test_a_tokeniser_with_more_tokens_than_rows(tmp_path):
    small = save(tmp_path / "small", plain(), rows=300, seed=2)
    target = save(tmp_path / "target", with_tokens(plain(), "<tool>"), seed=3)
    (problem,) = problems_of(small, [target], tmp_path / "none", "union")
    assert problem.startswith(f"base ({small}): its tokeniser has {len(plain())} tokens, but the model 300 rows")


def test_a_merge_by_norms_sees_no_delta_where_a_model_has_no_row(family, tmp_path):
    """A method with several passes over the rows: coefficients come from the tokens that a target has."""
    base, targets = family
    report = merge(base, targets, tmp_path / "out", "union", method="varm")
    rows = [rows_by_token(folder, EMBEDDING) for folder in (base, *targets)]
    tokens = set(rows[1]) | set(rows[2])
    means = {t: torch.stack([own[t] for own in rows[1:] if t in own]).double().mean(dim=0) for t in tokens}
    origins = {token: rows[0][token].double() if token in rows[0] else means[token] for token in tokens}
    energies = [sum(float((own[t].double() - origins[t]).square().sum()) for t in own) for own in rows[1:]]
    assert report.coefficients[EMBEDDING] == pytest.approx([energy / sum(energies) for energy in energies], rel=1e-4)


def test_spans_begin_and_end_anywhere(family):
    """Also within a row that is the mean of several."""
    base, targets = family
    for checkpoint in Inputs.open(base, targets, "union").checkpoints.values():
        home = checkpoint.homes[EMBEDDING]
        assert isinstance(home, TokenRows)
        flat = checkpoint[EMBEDDING].reshape(-1)
        end = len(flat)
        for start, stop in [(0, 1), (7, 300), (1601, 2900), (end - 45, end - 17), (end - 3, end)]:
            span = torch.empty(stop - start)
            home.read_span(EMBEDDING, start, span)
            assert torch.equal(span, flat[start:stop])


@pytest.mark.skipif(not MERGEKIT, reason="FUSION_MERGEKIT_PYTHON names no Python that has mergekit")
def test_mergekit_s_union_has_the_same_rows(family, tmp_path):
    base, targets = family
    models = [{"model": str(target), "parameters": {"weight": 0.3}} for target in targets]
    config = {"merge_method": "task_arithmetic", "base_model": str(base), "models": models, "dtype": "float32"}
    (tmp_path / "config.yml").write_text(yaml.safe_dump({**config, "tokenizer": {"source": "union"}}))
    run = [MERGEKIT, "-m", "mergekit.scripts.run_yaml", str(tmp_path / "config.yml"), str(tmp_path / "theirs")]
    subprocess.run(run, check=True, cwd=tmp_path, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    merge(base, targets, tmp_path / "ours", "union")
    for name in (EMBEDDING, HEAD):
        theirs, ours = rows_by_token(tmp_path / "theirs", name), rows_by_token(tmp_path / "ours", name)
        assert theirs.keys() == ours.keys()
        for token, row in ours.items():
            torch.testing.assert_close(theirs[token], row, rtol=1e-5, atol=1e-6, msg=f"{name} {token}")
