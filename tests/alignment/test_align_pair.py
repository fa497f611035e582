"""One source aligned to the pivot over a corpus of real dialogues, from teacher rows to sparse rows."""

from dataclasses import replace

import numpy as np
import pytest

from fusion.alignment import pair as module
from fusion.alignment.pair import align_pair
from fusion.alignment.target_kind import TargetKind
from fusion.config import UserError
from fusion.config.schema import AlignmentConfig, TeacherConfig
from fusion.dialogues.dialogue import chat
from fusion.dialogues.reader import encode_all, make_readers
from fusion.teaching.teach import teach

DIALOGUES = [
    chat(f"Which river {n}?", "The answer is yes. " * (1 + n % 3), "and 北京?", f"no {n} 👍🏽") for n in range(8)
]
NAMES = [dialogue.content_hash for dialogue in DIALOGUES]
TEACHER = TeacherConfig(top_k=6, device="cpu")


@pytest.fixture(scope="module")
def taught(tmp_path_factory, tiny_pivot, tiny_source):
    """Readers, tokens and teacher stores of the pivot, a twin of it, and the source."""
    cache = tmp_path_factory.mktemp("cache")

    def read(template):
        readers = make_readers([tiny_pivot, replace(tiny_pivot, name="twin"), tiny_source], template)
        tokens, dropped = encode_all(readers, DIALOGUES)
        assert not dropped
        stores = [
            teach(reader.model, reader.identity, reader.vocab_size, one, TEACHER, cache)
            for reader, one in zip(readers, tokens, strict=True)
        ]
        return readers, tokens, stores

    return {template: read(template) for template in ("shared", "native")}


@pytest.fixture
def align(taught, tmp_path):
    def run(other, settings=None, template="shared", names=NAMES, cache=tmp_path):
        readers, tokens, stores = taught[template]
        settings = settings or AlignmentConfig(name="ms")
        return align_pair(readers[0], readers[other], tokens[0], tokens[other], stores[other], names, settings, cache)

    return run


def refuse(*_, **__):
    raise AssertionError("this was done before")


@pytest.mark.parametrize("name", ["em", "ms"])
def test_a_twin_says_what_the_pivot_says(align, taught, name):
    aligned = align(1, AlignmentConfig(name=name))
    _, tokens, stores = taught["shared"]
    report = aligned.report
    rows = sum(len(tokens[0][one].rows_R) for one in NAMES)
    assert (report["supervised_rows"], report["aligned"], report["covered"]) == (rows, 1.0, 1.0)
    assert report["kinds"]["1-1"]["rows"] == rows
    assert (report["dtw"]["another_row"], report["dtw"]["no_row"], report["unproven_rows"]) == (0, 0, 0)
    kept = sum(len(tokens[0][one].rows_R) - stores[1][one].tail_R.sum(dtype=float) for one in NAMES) / rows
    assert report["mass_kept"] == pytest.approx(kept, abs=0.01)
    for one in NAMES:
        own = TargetKind().own(stores[0][one])
        for found, wanted in zip(aligned[one].padded(6), own.padded(6), strict=True):
            order = np.argsort(aligned[one].padded(6)[0]), np.argsort(own.padded(6)[0])
            np.testing.assert_allclose(
                np.take_along_axis(found, order[0], 1), np.take_along_axis(wanted, order[1], 1), atol=1e-5
            )


@pytest.mark.parametrize("template", ["shared", "native"])
@pytest.mark.parametrize(
    "settings",
    [
        AlignmentConfig(name="em"),
        AlignmentConfig(name="mined"),
        AlignmentConfig(name="ms"),
        AlignmentConfig(name="ms_released", path="dtw", options={"use_matrix": True}),
    ],
    ids=lambda settings: settings.name,
)
def test_rows_are_distributions_over_pivot_tokens(align, taught, template, settings):
    aligned = align(2, settings, template)
    readers, tokens, _ = taught[template]
    covered = 0
    for one in NAMES:
        rows = aligned[one]
        assert len(rows) == len(tokens[0][one].rows_R)
        assert rows.ids_E.max() < readers[0].vocab_size
        assert rows.ids_E.min() >= 0
        sums = np.bincount(rows.row_of_E, weights=rows.weights_E, minlength=len(rows))
        assert (sums <= 1 + 1e-5).all()
        covered += int((~rows.is_empty_R).sum())
    total = aligned.report["supervised_rows"]
    assert aligned.report["covered"] == pytest.approx(covered / total, abs=1e-6)
    assert 0 < aligned.report["covered"] <= aligned.report["aligned"] <= 1


def test_only_rows_that_have_read_the_same_bytes_are_aligned(align, taught):
    aligned = align(2)
    _, tokens, _ = taught["shared"]
    for one in NAMES:
        pivot, source = tokens[0][one], tokens[2][one]
        shared = np.isin(pivot.ends_N[pivot.rows_R], source.ends_N[source.rows_R])
        assert (~aligned[one].is_empty_R <= shared).all()
        assert shared.sum() >= 2


def test_the_first_and_the_last_row_of_a_turn_are_always_aligned(align, taught):
    report = align(2, template="native").report
    _, tokens, _ = taught["native"]
    assert report["supervised_rows"] == sum(len(tokens[0][one].rows_R) for one in NAMES)
    for one in NAMES:
        for model in (0, 2):
            ends_R = tokens[model][one].ends_N[tokens[model][one].rows_R]
            assert ends_R[0] == 0
            assert ends_R[-1] == tokens[model][one].num_bytes - 1


def test_the_result_is_kept_and_asked_for_by_content(align, tmp_path, monkeypatch):
    first = align(2)
    other = align(2, cache=tmp_path / "other", names=NAMES[::-1])
    assert other.folder.name == first.folder.name
    for file in first.folder.iterdir():
        assert file.read_bytes() == (other.folder / file.name).read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(module, "_build", refuse)
        assert align(2).folder == first.folder
    folders = {
        first.folder,
        align(1).folder,
        align(2, AlignmentConfig(name="em")).folder,
        align(2, AlignmentConfig(name="ms", path="dtw")).folder,
        align(2, names=NAMES[:-1]).folder,
        align(2, template="native").folder,
    }
    assert len(folders) == 6


def test_what_rows_fall_back_to_is_not_aligned_anew(align):
    assert align(2, AlignmentConfig(fallback="gold")).folder == align(2, AlignmentConfig(fallback="skip")).folder


OWN = """
from fusion.alignment.strategies import em

def build(pair, statistics):
    return em.build(pair, statistics)
"""


def test_a_strategy_of_the_users_own_counts_with_its_code(align, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_aligners").mkdir()
    (tmp_path / "my_aligners" / "__init__.py").touch()
    (tmp_path / "my_aligners" / "exact.py").write_text(OWN)
    aligned = align(2, AlignmentConfig(name="my_aligners.exact"))
    assert aligned.report == align(2, AlignmentConfig(name="em")).report
    assert module._own_code("my_aligners.exact") == ["my_aligners.exact"]
    assert module._own_code("em") == module._own_code("no.such.module") == module._own_code("..") == []
    with pytest.raises(UserError, match=r"alignment=my_aligners\.none"):
        align(2, AlignmentConfig(name="my_aligners.none"))
