"""Score sheets: what scorers return, paired differences, and tables that mark only what is significant."""

import numpy as np
import pytest

from fusion.dialogues.dialogue import chat
from fusion.evaluation.candidate import Candidate
from fusion.evaluation.dialogue_scorers import Heldout, Readings, Skills
from fusion.evaluation.score import score_folder
from fusion.evaluation.sheet import ScoredItem, ScoreSheet, difference, item_rows, merged_sheets
from fusion.evaluation.significance import against, contrasts, markdown

WORDS = ("river", "wire", "pole", "yes", "no", "answer", "lines", "space")
TEST = [chat(f"say {word} {number}", word, category=f"skill{number % 2}") for number in range(3) for word in WORDS]
HELDOUT = [chat(word, f"{word} and {word}", category=word[0]) for word in WORDS]


def sheet(model, scores, seed=0, **changes):
    items = tuple(ScoredItem(f"q{number}", f"c{number % 2}", seed, score) for number, score in enumerate(scores))
    return ScoreSheet("marks", model, items, **changes)


@pytest.fixture
def readings(tmp_path):
    return Readings(TEST, HELDOUT, 256, tmp_path)


def test_scorers_give_what_the_merge_reports(tiny_pivot, readings):
    """Averages of the items equal the numbers of `score_folder`, which the comparison of a merge shows."""
    candidate = Candidate.of_folder(tiny_pivot)
    scores = score_folder(candidate.reader, TEST, HELDOUT, 256, readings.cache)
    skills, heldout = Skills(readings).score(candidate), Heldout(readings).score(candidate)
    assert skills.result().mean == pytest.approx(scores.scores["average"])
    assert {name: skills.result(name).mean for name in skills.categories} == {
        name: score for name, score in scores.scores.items() if name != "average"
    }
    assert heldout.result().mean == pytest.approx(scores.nll_per_byte, rel=1e-9)
    assert {one.item for one in heldout.items} == {dialogue.content_hash for dialogue in HELDOUT}


def test_a_live_module_scores_as_its_folder_does(tiny_pivot, readings):
    folder = Candidate.of_folder(tiny_pivot)
    live = Candidate(folder.reader, folder.module())
    assert Heldout(readings).score(live) == Heldout(readings).score(folder)
    assert Skills(readings).score(live) == Skills(readings).score(folder)


def test_identity_of_a_live_module_follows_its_weights(tiny_pivot):
    candidate = Candidate.of_folder(tiny_pivot)
    module = candidate.module()
    before = Candidate(candidate.reader, module).identity
    assert before == Candidate(candidate.reader, module).identity
    next(module.parameters()).data[0] += 1
    assert before != Candidate(candidate.reader, module).identity


def test_difference_uses_the_common_items_only():
    first, second = sheet("a", [1, 2, 3, None]), sheet("b", [0, 0, 0, 9])
    result = difference(first, second)
    assert (result.mean, result.num_items) == (2.0, 3)
    assert difference(sheet("a", [1, None, None]), second) is None


def test_seeds_with_the_same_questions_are_crossed_and_with_their_own_nested():
    rng = np.random.default_rng(0)
    crossed = merged_sheets([sheet("a", rng.normal(1, 1, 40), seed) for seed in range(3)])
    nested = ScoreSheet(
        "marks", "a", tuple(ScoredItem(f"{x.seed}{x.item}", x.category, x.seed, x.score) for x in crossed.items)
    )
    assert crossed.result().mean == pytest.approx(nested.result().mean)
    assert crossed.result().num_seeds == nested.result().num_seeds == 3
    assert nested.result().freedom == 2
    assert crossed.result().freedom > 2


def test_only_significant_differences_are_marked():
    rng = np.random.default_rng(1)
    base = rng.normal(5, 1, 80)
    noise = base + rng.normal(0, 1, 80)
    better, worse = base + rng.normal(1, 0.5, 80), base - rng.normal(1, 0.5, 80)
    sheets = [sheet(name, scores) for name, scores in zip("abcd", (base, noise, better, worse), strict=True)]
    assert {one.first: one.mark for one in against(sheets[0], sheets[1:]) if one.category == "average"} == {
        "b": "",
        "c": "▲",
        "d": "▼",
    }
    text = markdown(sheets, contrasts(sheets))
    rows = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("|")}
    assert "▲" in rows["c"]
    assert not {"▲", "▼"} & set(rows["b"])
    assert "not shown" in rows["b against a"]
    assert "▲" in rows["c against a"]


def test_less_is_better_for_losses():
    rng = np.random.default_rng(2)
    base = rng.exponential(size=60)
    sheets = [sheet(name, scores, more_is_better=False) for name, scores in (("a", base), ("b", base - 0.5))]
    assert [one.mark for one in contrasts(sheets)] == ["▲"]


def test_fewer_pairs_are_corrected_less():
    rng = np.random.default_rng(3)
    base = rng.normal(5, 1, 60)
    sheets = [sheet(name, base + step) for name, step in zip("abcd", rng.normal(0.1, 0.5, (4, 60)), strict=True)]
    found = {which: contrasts(sheets, which) for which in ("all", "first", "next")}
    names = {which: [one.first + one.second for one in some] for which, some in found.items()}
    assert names == {
        "all": ["ba", "ca", "da", "cb", "db", "dc"],
        "first": ["ba", "ca", "da"],
        "next": ["ba", "cb", "dc"],
    }
    single = {one.first + one.second: one.result for one in found["all"]}
    for some in found.values():
        smallest = min(some, key=lambda one: one.result.p_value)
        assert smallest.adjusted == pytest.approx(min(1, len(some) * smallest.result.p_value))
        assert all(one.result == single[one.first + one.second] for one in some)


def test_what_is_left_out_is_told():
    sheets = [sheet("a", [1, 2, None]), sheet("b", [2, 1, 3], notes=("not comparable",))]
    text = markdown(sheets, contrasts(sheets))
    assert "a: 1 of 3 items have no score and are left out." in text
    assert "- not comparable" in text
    assert [row["score"] for row in item_rows(sheets[:1])] == [1, 2, None]


def test_a_seed_counts_once():
    with pytest.raises(ValueError, match="a seed each"):
        merged_sheets([sheet("a", [1, 2]), sheet("a", [1, 2])])
