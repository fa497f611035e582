"""The store that training reads: every example as it was written, repeats and all."""

import hashlib

import numpy as np
import pytest
from tiny_models import encoder

from fusion.alignment.target_kind import TargetKind
from fusion.dialogues.dialogue import chat
from fusion.objective.fuse import FusedDialogue
from fusion.objective.fused_store import FusedStore
from fusion.objective.target_form import TargetForm
from fusion.teaching.sparse_rows import gather_entries

FORM = TargetForm(TargetKind("spans", 7.0), "bucket")


def fused_of(encoded, seed):
    rng = np.random.default_rng(seed)
    rows = len(encoded.rows_R)
    row_E = np.repeat(np.arange(rows), 3)
    weights = rng.random(3 * rows) * (rng.random(3 * rows) > 0.4)
    return FusedDialogue(
        gather_entries(row_E, rng.integers(0, 99, 3 * rows), weights, rows), f"model {seed % 2}", seed, {}
    )


@pytest.fixture
def written(tmp_path):
    dialogues = [chat("q", "yes " * number, "r", "no") for number in range(1, 6)]
    encoded = {one.content_hash: encoder("metaspace", "openchat").encode(one) for one in dialogues}
    fused = {name: fused_of(one, seed) for seed, (name, one) in enumerate(encoded.items())}
    names = list(encoded)
    examples = [names[3], names[0], names[3], names[4]]
    FusedStore.write(tmp_path, encoded, fused, examples, {"who_won": {"a": 2}}, FORM)
    return FusedStore(tmp_path), encoded, fused, examples


def test_examples_come_back_in_their_order(written):
    store, encoded, fused, examples = written
    assert len(store) == 4
    assert store.examples == examples
    for number, name in enumerate(examples):
        example = store[number]
        assert (example.ids_N == encoded[name].ids_N).all()
        assert (example.rows_R == encoded[name].rows_R).all()
        assert (example.targets.indptr_R == fused[name].rows.indptr_R).all()
        assert (example.targets.ids_E == fused[name].rows.ids_E).all()
        assert (example.targets.weights_E == fused[name].rows.weights_E).all()
        assert store.lengths[number] == len(encoded[name].ids_N)
        assert store.num_rows[number] == len(encoded[name].rows_R)


def test_winners_and_summary(written):
    store, encoded, fused, _ = written
    assert store.winners == {name: fused[name].winner for name in encoded}
    assert store.summary == {"who_won": {"a": 2}}


def test_the_form_is_known_without_the_settings(written):
    assert written[0].form == FORM


def test_equal_content_is_equal_bytes(written, tmp_path):
    store, encoded, fused, examples = written
    again = tmp_path / hashlib.md5(b"again").hexdigest()
    again.mkdir()
    FusedStore.write(
        again, dict(reversed(encoded.items())), dict(reversed(fused.items())), examples, store.summary, FORM
    )
    for file in again.iterdir():
        assert file.read_bytes() == (store.folder / file.name).read_bytes()


def test_a_store_may_train_on_nothing(written, tmp_path):
    _, encoded, fused, _ = written
    (tmp_path / "empty").mkdir()
    FusedStore.write(tmp_path / "empty", encoded, fused, [], {}, FORM)
    store = FusedStore(tmp_path / "empty")
    assert len(store) == len(store.lengths) == len(store.num_rows) == 0
