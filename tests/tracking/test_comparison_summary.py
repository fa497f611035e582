"""How seeds are joined, models named and ordered, and the best merge called best or tied."""

import dataclasses

import pytest
from sample_rows import baselines, row, sweep

from fusion.tracking.grouping import summarise
from fusion.tracking.statistics import estimate, overlap
from fusion.tracking.summary import share_text


def test_order_is_pivot_sources_sft_targets_merged_by_average():
    models = summarise(sweep()).models
    assert [(model.kind, model.label) for model in models] == [
        ("pivot", "pivot"),
        ("source", "tiny_a"),
        ("source", "tiny_b"),
        ("sft", "sft"),
        ("target", "tiny_a"),
        ("target", "tiny_b"),
        ("merged", "sce"),
        ("merged", "linear"),
    ]


def test_skills_follow_the_sources_that_are_strong_in_them():
    assert summarise(sweep()).skills == ("facts", "followup", "add", "units", "order", "translate")


def test_seeds_become_mean_and_deviation_with_the_values_at_hand():
    models = summarise(
        [row("sce", "merged", score, seed=seed) for seed, score in ((2, 0.7), (1, 0.6), (3, 0.8))]
    ).models
    assert len(models) == 1
    assert models[0].average.values == (0.6, 0.7, 0.8)
    assert share_text(models[0].average) == "70.0 ± 10.0"


def test_one_folder_scored_by_jobs_of_several_seeds_is_one_measurement():
    rows = [row("pivot", "pivot", 0.4, seed=seed, path="models/pivot") for seed in (1, 2, 3)]
    (model,) = summarise(rows).models
    assert len(model.average.values) == 1
    assert len(model.rows) == 3


def test_settings_that_differ_are_other_models_and_are_named():
    rows = [
        row(
            "sce",
            "merged",
            score,
            seed=seed,
            path=f"{tau}{seed}",
            parameters={"sce": {"tau": tau}, "seed": seed, "k": 1},
        )
        for tau, score in ((0.1, 0.7), (0.5, 0.6))
        for seed in (1, 2)
    ]
    assert [model.label for model in summarise(rows).models] == ["sce sce.tau=0.1", "sce sce.tau=0.5"]


def test_long_numbers_are_rounded_in_names():
    found = [row("sce", "merged", 0.6, parameters={"weight": [one, 2, "a"], "tau": one}) for one in (0.123456789, 0.5)]
    labels = {model.label for model in summarise([*baselines(), *found]).models if model.kind == "merged"}
    assert labels == {"sce tau=0.1235", "sce tau=0.5"}
    found = [row("sce", "merged", 0.6, parameters={"weight": [one, 2, "a"]}) for one in (0.123456789, 0.5)]
    labels = {model.label for model in summarise([*baselines(), *found]).models if model.kind == "merged"}
    assert labels == {"sce weight=[0.1235, 2, a]", "sce weight=[0.5, 2, a]"}


def test_ablations_of_targets_stay_apart_and_are_named_by_what_tells_them_apart():
    recipes = {
        "ms": {"alignment": {"name": "ms", "tail": "scale", "options": {}}},
        "strict": {"alignment": {"name": "strict", "tail": "bucket", "options": {}}},
        "alm": {"alignment": {"name": "alm", "tail": "scale", "options": {"temperature": 100.0}}},
    }
    rows = [
        row("tiny_a", "target", 0.5, seed=seed, path=f"{name}{seed}", parameters=recipe)
        for name, recipe in recipes.items()
        for seed in (1, 2)
    ]
    models = summarise(rows).models
    assert [model.label for model in models] == [f"tiny_a alignment={name}" for name in ("alm", "ms", "strict")]
    assert all(len(model.average.values) == 2 for model in models)


def test_searched_scales_are_one_model_and_fixed_scales_are_several():
    searched = [row("sce", "merged", 0.7, seed=seed, scale=1.0 + seed / 10, scale_searched=True) for seed in (7, 9)]
    fixed = [row("sce", "merged", 0.6, path=str(scale), scale=scale) for scale in (0.5, 1.0)]
    models = summarise(searched + fixed).models
    assert [model.label for model in models] == ["sce scale=search", "sce scale=0.5", "sce scale=1"]
    assert models[0].scale_text == "scale 1.7 to 1.9, searched"


@pytest.mark.parametrize(
    ("scores", "verdicts"),
    [
        ((0.9, 0.5, 0.4), ["best", "", ""]),
        ((0.60, 0.59, 0.2), ["tied", "tied", ""]),
        ((0.6,), [""]),
        ((0.6, None), [""] * 2),
    ],
)
def test_best_only_where_no_interval_meets(scores, verdicts):
    rows = [row(f"method_{number}", "merged", score) for number, score in enumerate(scores)]
    assert [model.verdict for model in summarise(rows).models] == verdicts


def test_without_question_counts_nothing_is_called_best():
    rows = [row("a", "merged", 0.9, num_items={}), row("b", "merged", 0.2, num_items={})]
    assert [model.verdict for model in summarise(rows).models] == ["tied", "tied"]
    assert overlap(estimate([0.9]), estimate([0.1]))


def test_headline_names_the_leaders():
    best = "best merged: sce 71.2 (scale 1.8, searched) | best target 58.1 | SFT 55.3 | pivot 40.7"
    assert summarise(sweep()).headline == best
    tied = summarise([row("linear", "merged", 0.7), *sweep()[1:]]).headline
    assert tied.startswith("best merged (tied): sce 71.2 (scale 1.8, searched) | ")
    assert summarise(baselines()).headline == "best target 58.1 | SFT 55.3 | pivot 40.7"


def test_paired_difference_needs_seeds_of_both_that_vary():
    first = [row("sce", "merged", score, seed=seed) for seed, score in enumerate((0.70, 0.72, 0.77))]
    second = [row("ties", "merged", score, seed=seed) for seed, score in enumerate((0.68, 0.71, 0.74))]
    sentence = summarise(first + second).paired_difference
    assert sentence == "sce against ties, paired over 3 seeds: +2.0 points (95% -0.5 to +4.5)"
    assert summarise(first[:1] + second[:1]).paired_difference == ""
    steady = [
        dataclasses.replace(one, model="x", strategy="x", scores={"average": one.scores["average"]}) for one in first
    ]
    assert summarise(first + steady).paired_difference == ""
