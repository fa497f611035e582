"""Configurations of mergekit in our terms: values, inputs, what is said about differences, and what is refused."""

import shlex
from textwrap import dedent

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir

from fusion.config.compose import CONFIG_FOLDER, register, to_settings
from fusion.config.schema import MergeConfig
from fusion.merging import check_parameters, merge_state_dicts
from fusion.merging.import_mergekit import import_config, main, read_config
from fusion.merging.mergekit.rules import RULES


def imported(text):
    found = import_config(yaml.safe_load(dedent(text)))
    assert not found.problems, found.problems
    return found


def problems_of(text):
    return import_config(yaml.safe_load(dedent(text))).problems


def of_method(method, parameters="{}", models="a: {weight: 1}, b: {weight: 1}", base="base_model: p"):
    listed = [{"model": name, "parameters": own} for name, own in yaml.safe_load("{" + models + "}").items()]
    config = {"merge_method": method, "models": listed, "parameters": yaml.safe_load(parameters)}
    return import_config(config | (yaml.safe_load(base) if base else {}))


def said(found, word):
    return any(word in note for note in found.notes)


def test_linear_averages_all_models_without_a_base():
    found = imported("""
        merge_method: linear
        models:
          - {model: a, parameters: {weight: 1.0}}
          - {model: b, parameters: {weight: "3e-1"}}
        dtype: bfloat16
    """)
    assert (found.method, found.targets, found.base) == ("linear", ["a", "b"], None)
    assert found.parameters == {"weight": [1.0, 0.3], "normalize": True}
    assert said(found, "dtype")
    assert said(found, "a is no folder")


def test_the_base_is_no_target_but_in_linear_and_slerp():
    arithmetic = imported("""
        merge_method: task_arithmetic
        base_model: p
        models: [{model: p}, {model: a, parameters: {weight: 0.4}}, {model: b}]
        parameters: {weight: 0.2, lambda: 1.5, int8_mask: true}
    """)
    assert (arithmetic.targets, arithmetic.base) == (["a", "b"], "p")
    assert arithmetic.parameters == {"weight": [0.4, 0.2], "normalize": False, "scale": 1.5}
    assert said(arithmetic, "int8_mask")
    assert of_method("slerp", "{t: 0.3}", "b: {}").targets == ["p", "b"]
    assert of_method("slerp", "{t: 0.3}", "b: {}").base is None
    assert of_method("linear", "{weight: 1}").targets == ["a", "b", "p"]


def test_ties_takes_its_density_from_mergekits_default():
    found = of_method("ties", models="a: {weight: 1, density: 0.5}, b: {weight: 1}")
    assert found.parameters == {"weight": 1, "density": [0.5, 1.0], "normalize": True, "scale": 1.0}


@pytest.mark.parametrize("method", ["dare_ties", "dare_linear", "della", "della_linear"])
def test_random_dropping_is_rescaled_by_norms(method):
    found = of_method(method, "{density: 0.5}")
    assert found.parameters["rescale"] == "l1"
    assert said(found, "L1 norm")
    assert said(found, "seed")
    assert found.parameters["normalize"] is (method == "della")
    assert "rescale: false is not built here: only true" in of_method(method, "{rescale: false}").problems


def test_what_mergekit_computes_otherwise_has_a_method_or_a_switch():
    assert of_method("sce", "{select_topk: 0.1}", "a: {}, b: {}").parameters == {"tau": 0.1}
    assert of_method("sce", models="a: {}, b: {}").method == "sce_mergekit"
    stock = of_method("model_stock", "{filter_wise: true}", "a: {}, b: {}")
    assert stock.parameters == {"unit": "row", "compat": "mergekit"}
    plus = of_method("ramplus_tl", models="a: {}, b: {}")
    assert plus.method == "ram"
    assert plus.parameters == {"epsilon": 1e-5, "boost": 0.1, "limit": 0.2}
    crumbs = of_method("breadcrumbs", models="a: {weight: 1, gamma: 0.02}, b: {weight: 1, density: 0.8}")
    assert crumbs.parameters["gamma"] == [0.02, 0.01]
    assert crumbs.parameters["density"] == [1.0, 0.8]


def test_slerp_with_filters_and_gradients_computes_what_is_written():
    found = of_method(
        "slerp",
        "{t: [{filter: self_attn, value: [0, 0.5, 1]}, {filter: mlp, value: [1, 0]}, {value: 0.25}]}",
        "b: {}",
    )
    assert list(found.parameters["t"]) == ["*self_attn*", "*mlp*", "*"]
    assert said(found, "first")
    names = [f"model.layers.{layer}.{part}.w" for layer in range(3) for part in ("self_attn", "mlp")]
    targets = [dict.fromkeys([*names, "lm_head.w"], torch.tensor([value, 0.0])) for value in (1.0, 2.0)]
    merged = merge_state_dicts("slerp", None, targets, **found.parameters)
    values = [float(merged[name][0]) for name in [*names, "lm_head.w"]]
    assert values == pytest.approx([1.0, 2.0, 1.5, 1.5, 2.0, 1.0, 1.25])


def test_gradients_of_different_lengths_meet_on_common_anchors():
    found = of_method(
        "task_arithmetic", models="a: {weight: [0, 1, 0]}, b: {weight: [0, 3, 0, 6]}, c: {weight: 2}, d: {weight: [4]}"
    )
    anchors = found.parameters["weight"]["gradient"]
    assert len(anchors) == 7
    assert [anchor[0] for anchor in anchors] == pytest.approx([0, 1 / 3, 2 / 3, 1, 2 / 3, 1 / 3, 0])
    assert [anchor[1] for anchor in anchors] == pytest.approx([0, 1.5, 3, 1.5, 0, 3, 6])
    assert {(anchor[2], anchor[3]) for anchor in anchors} == {(2, 4)}


def test_filters_of_one_model_leave_the_others_values_alone():
    found = of_method("linear", models="a: {weight: [{filter: mlp, value: 2}, {value: 1}]}, b: {weight: 3}", base="")
    assert found.parameters["weight"] == {"*mlp*": [2, 3], "*": [1, 3]}
    differing = (
        "a: {weight: [{filter: mlp, value: 2}, {value: 1}]}, b: {weight: [{filter: attn, value: 3}, {value: 1}]}"
    )
    assert "other filters" in of_method("linear", models=differing, base="").problems[0]


def test_filters_fall_through_to_the_whole_merges_values():
    found = of_method("ties", "{density: 0.3, weight: 1}", "a: {density: {filter: mlp, value: 0.9}}, b: {}")
    assert found.parameters["density"] == {"*mlp*": [0.9, 0.3], "*": 0.3}
    bare = of_method("ties", models="a: {weight: {filter: mlp, value: 0.9}}, b: {weight: 1}")
    assert bare.problems == ["weight: has no value for tensors that no filter fits"]


def test_the_base_s_tokens_are_the_merged_model_s():
    """mergekit matches rows by tokens then; where nothing is said it merges them by their numbers."""
    found = of_method("ties", "{weight: 1, tokenizer_source: base}")
    assert found.vocabulary is None  # no parameter
    for line in ("tokenizer_source: base", "tokenizer: {source: base}"):
        found = of_method("ties", base=f"base_model: p\n{line}")
        assert "vocabulary=base" in found.overrides
        assert yaml.safe_load(found.study)["vocabulary"] == "base"
    found = of_method("ties", base="base_model: p\ntokenizer: {source: union}")
    assert "vocabulary=union" in found.overrides
    assert any("other ids" in note for note in found.notes)
    alone = of_method("linear", base="base_model: a\ntokenizer_source: base")
    assert alone.vocabulary is None
    assert any("no base here" in note for note in alone.notes)


def test_all_problems_come_together():
    problems = problems_of("""
        merge_method: tiess
        models: [{model: a+lora}, {model: b}]
        chat_template: chatml
        tokenizer_source: model:x
        tokenizer: {source: union, tokens: {x: {}}}
    """)
    for word in ("tiess", "a+lora", "chat_template", "tokenizer_source", "tokenizer: "):
        assert any(word in problem for problem in problems), word
    many = of_method("ties", "{lambda: [1, 2], rescale: true}", "a: {}, b: {weight: 1, density: 1.5}", base="")
    for word in ("weight: is missing", "lambda: varies", "rescale: true", "base_model: is missing"):
        assert any(word in problem for problem in many.problems), word
    assert "density" in of_method("ties", models="a: {weight: 1, density: 1.5}").problems[0]
    assert "takes 2 targets, got 3" in of_method("slerp", "{t: 1}", "a: {}, b: {}").problems[0]


def test_an_adapter_of_the_base_is_a_target():
    found = of_method("task_arithmetic", models="p+x/lora: {weight: 1}, b: {weight: 2}")
    assert not found.problems
    assert (found.targets, found.parameters["weight"]) == (["x/lora", "b"], [1, 2])
    assert "another model than the base" in of_method("linear", "{weight: 1}", "q+x: {}").problems[0]


def test_slices_are_refused():
    problems = problems_of("""
        merge_method: passthrough
        slices: [{sources: [{model: a, layer_range: [0, 8]}]}, {sources: [{model: b, layer_range: [4, 12]}]}]
    """)
    assert len(problems) == 1
    assert problems[0].startswith("slices: ")


def test_unknown_keys_are_named():
    found = imported("""
        merge_method: nuslerp
        wieght: 3
        models: [{model: a, parameters: {weight: 1, desnity: 1}}, {model: b, parameters: {weight: 3}}]
        parameters: {nuslerp_flatten: false}
    """)
    assert found.parameters == {"weight": [1, 3], "unit": "row"}
    assert said(found, "wieght")
    assert said(found, "desnity")


@pytest.mark.parametrize("method", RULES)
def test_every_rule_sets_parameters_that_the_method_has(method):
    models = "a: {weight: 1}" if method in ("slerp", "nearswap", "arcee_fusion") else "a: {weight: 1}, b: {weight: 1}"
    models = "p: {weight: 1}" if method == "passthrough" else models
    found = of_method(method, "{t: 0.5, weight: 1}", models)
    assert not found.problems
    ours = {name: value for name, value in found.parameters.items() if name != "scale"}
    assert check_parameters(found.method, ours, num_targets=len(found.targets)) == []


CONFIG = """
    merge_method: dare_ties
    base_model: /models/my base
    models:
      - {model: /models/a, parameters: {weight: 0.5, density: [0.2, 0.8]}}
      - {model: /models/b, parameters: {weight: [{filter: mlp, value: 0.1}, {value: [0, 1]}], density: 0.5}}
    parameters: {normalize: true, lambda: 0.7}
"""


def settings_of(overrides):
    register()
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        return to_settings(compose("merge", overrides=overrides), MergeConfig)


def test_the_command_line_and_the_study_give_the_same_settings(tmp_path, capsys):
    path, study = tmp_path / "config.yml", tmp_path / "imported.yaml"
    path.write_text(dedent(CONFIG), "utf-8")
    assert main([str(path), "--out", str(study)]) == 0
    printed = capsys.readouterr().out.splitlines()
    settings = settings_of(shlex.split(printed[0])[2:])
    assert settings.base == "/models/my base"
    assert settings.targets == ["/models/a", "/models/b"]
    found = read_config(path)
    assert settings.merge == {"method": "dare_ties", **found.parameters}
    assert [line for line in printed if line.startswith("note: ")] == [f"note: {note}" for note in found.notes]
    text = study.read_text("utf-8")
    assert text.startswith("# @package _global_")
    body = yaml.safe_load(text)
    assert body.pop("defaults") == [{"override /merge": "dare_ties"}]
    assert body == {"targets": found.targets, "base": found.base, "merge": found.parameters}


def test_the_study_composes(tmp_path):
    path = tmp_path / "config.yml"
    path.write_text(dedent(CONFIG), "utf-8")
    found = read_config(path)
    folder = tmp_path / "conf"
    (folder / "experiments").mkdir(parents=True)
    (folder / "experiments" / "imported.yaml").write_text(found.study, "utf-8")
    settings = settings_of([f"hydra.searchpath=[file://{folder}]", "experiments=imported"])
    assert settings.merge == {"method": "dare_ties", **found.parameters}
    assert settings.targets == found.targets


def test_what_cannot_be_read_or_done_ends_with_2(tmp_path, capsys):
    path = tmp_path / "config.yml"
    for text in ("merge_method: [", "- 1", "merge_method: ties"):
        path.write_text(text, "utf-8")
        assert main([str(path)]) == 2
        assert str(path) in capsys.readouterr().err
    assert main([str(tmp_path / "none.yml")]) == 2
