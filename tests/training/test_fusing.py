"""Fused targets of a corpus: every level, every kind of targets, several sources, and the hard control."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_alignment import fake_align_pair
from stage1_settings import settings
from tiny_models import make_llama, make_tokenizer, save

from fusion.alignment.target_kind import TargetKind
from fusion.config import UserError
from fusion.config.schema import AlignmentConfig, FusionConfig, ObjectiveConfig, SourceConfig
from fusion.dialogues.load import load_splits
from fusion.dialogues.reader import encode_all, make_readers
from fusion.teaching.teach import teach
from fusion.training.data import FusionDataModule
from fusion.training.prepare import prepare, sources

KINDS = {"distribution": TargetKind(), "ranks": TargetKind("ranks"), "spans": TargetKind("spans", 10.0)}


@pytest.fixture(scope="module")
def rival(tmp_path_factory):
    """As good as the pivot, with the same tokeniser: each wins some dialogues."""
    tokenizer = make_tokenizer("metaspace", "openchat")
    return save(tmp_path_factory.mktemp("rival"), make_llama(len(tokenizer), seed=1), tokenizer, "source")


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_pivot, rival):
    return settings(tmp_path_factory.mktemp("fusing"), tiny_pivot, rival)


@pytest.fixture
def aligned(monkeypatch):
    """Replace the alignment by one of that kind."""

    def use(name):
        monkeypatch.setattr("fusion.training.prepare.align_pair", fake_align_pair(KINDS[name]))

    return use


def everything(config):
    """Dialogues to train on, and for every model its tokens and what it says."""
    train, heldout = load_splits(config.data)
    models = [config.pivot, *sources(config)]
    readers = make_readers(models, config.template, config.data.max_length)
    encoded, _ = encode_all(readers, [*train, *heldout])
    stores = [
        teach(reader.model, reader.identity, reader.vocab_size, tokens, config.teacher, config_cache(config))
        for reader, tokens in zip(readers, encoded, strict=True)
    ]
    return [one.content_hash for one in train], readers, encoded, stores


def config_cache(config):
    return Path(config.paths.cache)


def per_byte(name, encoded, stores):
    return [
        float(store[name].nll_R.sum()) / tokens[name].num_bytes for tokens, store in zip(encoded, stores, strict=True)
    ]


def with_fusion(config, tail="scale", fallback="gold", **fusion):
    alignment = replace(config.alignment, tail=tail, fallback=fallback)
    return replace(config, fusion=FusionConfig(**fusion), alignment=alignment)


def sums_of(fused):
    for number in range(len(fused)):
        targets = fused[number].targets
        yield np.bincount(targets.row_of_E, targets.weights_E, len(targets))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tail", ["scale", "bucket"])
@pytest.mark.parametrize("level", ["dialogue", "span", "token"])
def test_every_level_and_kind_or_a_clear_refusal(base, aligned, kind, tail, level):
    aligned(kind)
    config = with_fusion(base, tail, level=level)
    if level == "token" and kind != "distribution":
        with pytest.raises(UserError, match=rf"fusion\.level=token .*{kind}"):
            prepare(config)
        return
    prepared = prepare(config)
    report, fused = prepared.report, prepared.fused
    assert fused.form.kind == KINDS[kind]
    assert fused.form.tail == tail
    assert report["targets"] == fused.form.to_json()
    assert report["level"] == level
    assert set(report["who_won"]) == {"pivot", "source"}
    assert sum(report["who_won"].values()) == len(fused)
    assert sum(report["rows_won"].values()) == pytest.approx(1, abs=1e-5)
    sums = np.concatenate(list(sums_of(fused)))
    if kind == "distribution" and tail == "scale":
        np.testing.assert_allclose(sums, 1, atol=1e-6)
    else:
        assert sums.max() <= 1 + 1e-6
        assert sums.min() < 0.95


def test_what_a_token_is_won_by(base, aligned):
    aligned("distribution")
    config = with_fusion(base, "bucket", level="token")
    fused = prepare(config).fused
    train, readers, encoded, stores = everything(config)
    rows = fake_align_pair(KINDS["distribution"])(*readers, *encoded, None, train, None, None)
    won = total = 0
    for number, name in enumerate(fused.examples):
        example, said = fused[number], rows[name]
        references = example.ids_N[example.rows_R + 1]
        for row in range(len(example.rows_R)):
            entries = slice(*said.indptr_R[row : row + 2])
            mass = said.weights_E[entries][said.ids_E[entries] == references[row]].sum()
            found = slice(*example.targets.indptr_R[row : row + 2])
            by_source = mass > np.exp(-stores[0][name].nll_R[row])
            own = stores[0][name]
            wanted = said.ids_E[entries] if by_source else np.sort(own.ids_RK[row])
            assert example.targets.ids_E[found].tolist() == wanted.tolist()
            won, total = won + by_source, total + 1
    assert 0 < won < total
    assert fused.summary["rows_won"]["source"] == pytest.approx(won / total, abs=1e-6)


def test_spans_of_two_tokenisers(base, aligned, tiny_source):
    aligned("distribution")
    config = replace(base, source=SourceConfig(**vars(tiny_source)))
    by_dialogue, by_span = (prepare(with_fusion(config, level=level)) for level in ("dialogue", "span"))
    assert by_dialogue.report["rows_won"] == {"pivot": 0, "source": 1}
    assert 0 < by_span.report["rows_won"]["pivot"] < 0.5
    assert by_span.report["supervised_rows"] == by_dialogue.report["supervised_rows"]


@pytest.mark.parametrize("kind", KINDS)
def test_spans_of_fusion_tell_more_than_dialogues(base, aligned, kind):
    aligned(kind)
    by_dialogue, by_span = (prepare(with_fusion(base, level=level)).report for level in ("dialogue", "span"))
    assert by_dialogue["rows_won"] != by_span["rows_won"]
    assert by_dialogue["heldout_won"] == by_span["heldout_won"]  # always decided by dialogue
    assert by_span["rows_won"]["source"] not in (0, 1)


def test_spans_cannot_be_mixed_and_nothing_is_half_written(base, aligned):
    aligned("spans")
    config = with_fusion(base, name="avg_ce")
    before = stores_of(config)
    with pytest.raises(UserError, match="cannot be mixed"):
        prepare(config)
    assert stores_of(config) == before
    for kind in ("distribution", "ranks"):
        aligned(kind)
        fused = prepare(config).fused
        widths = np.concatenate([np.diff(fused[number].targets.indptr_R) for number in range(len(fused))])
        assert widths.max() > (4 if kind == "distribution" else 3)  # more than one model says


def stores_of(config):
    folder = config_cache(config) / "fusion"
    return sorted(one for one in folder.iterdir() if one.name[0] != ".") if folder.exists() else []


def test_other_levels_tails_and_kinds_are_other_stores(base, aligned):
    folders = []
    for kind, tail, level in (
        ("distribution", "scale", "dialogue"),
        ("distribution", "bucket", "dialogue"),
        ("distribution", "scale", "span"),
        ("ranks", "scale", "dialogue"),
    ):
        aligned(kind)
        folders.append(prepare(with_fusion(base, tail, level=level)).fused.folder)
    assert len(set(folders)) == 4


@pytest.mark.parametrize("level", ["dialogue", "span", "token"])
def test_many_sources_and_the_share_of_pivot_won_dialogues_at_every_level(base, aligned, rival, level):
    aligned("distribution")
    members = {"a": {"path": rival.path}, "bb": {"path": rival.path}}
    config = replace(base, source=SourceConfig(name="all", path="", members=members))
    whole = prepare(with_fusion(config, level=level))
    none = prepare(with_fusion(config, level=level, keep_pivot_won=0.0))
    assert set(whole.report["rows_won"]) == {"pivot", "a", "bb"}
    assert none.report["who_won"] == whole.report["who_won"]
    winners = whole.fused.winners
    assert none.fused.examples == [name for name in whole.fused.examples if winners[name] != "pivot"]
    assert 0 < len(none.fused) < len(whole.fused)
    if level != "token":  # twins tie, and the earlier one has it
        assert whole.report["rows_won"]["bb"] == 0


def hard_control(config):
    """`experiments=hard_labels` on these dialogues."""
    from hydra import compose, initialize_config_dir

    from fusion.config.compose import CONFIG_FOLDER, register, to_settings
    from fusion.config.schema import TrainConfig

    register()
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        found = to_settings(compose("train", overrides=["experiments=hard_labels"]), TrainConfig)
    assert found.fusion == FusionConfig(keep_pivot_won=0.0)
    return replace(config, objective=found.objective, fusion=found.fusion)


def test_the_hard_control_learns_one_hot_references_of_what_a_source_won(base):
    config = hard_control(base)
    data = FusionDataModule(config)
    data.setup()
    train, _, encoded, stores = everything(config)
    won = [name for name in train if np.argmin(per_byte(name, encoded, stores)) > 0]
    assert 0 < len(won) < len(train)
    assert data.prepared.fused.examples == won
    assert data.prepared.report["who_won"] == {"pivot": len(train) - len(won), "source": len(won)}
    soft = prepare(replace(config, objective=ObjectiveConfig()))
    assert soft.fused.folder == data.prepared.fused.folder  # the same dialogues; only the loss is another


def test_a_store_says_what_its_alignment_is(base, aligned):
    aligned("spans")
    assert prepare(replace(base, alignment=AlignmentConfig(fallback="skip"))).fused.form.kind == KINDS["spans"]
