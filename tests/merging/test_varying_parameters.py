"""Parameters per target, per layer and per name: what reaches the method at each tensor, and what is refused."""

import json

import pytest
import torch
from merge_inputs import DATA_FREE, save_model, width

from fusion.config import UserError
from fusion.config.schema import MergeConfig
from fusion.merging import check_parameters, merge_deltas, merge_folders, merge_state_dicts
from fusion.merging.layers import depths_of, is_embedding
from fusion.merging.method import load_method
from fusion.merging.parameters import options_of
from fusion.merging.varying import value_at, varying

NAMES = [
    "lm_head.weight",
    "model.embed_tokens.weight",
    *(f"model.layers.{layer}.{part}.weight" for layer in range(5) for part in ("mlp", "attn")),
    "model.norm.weight",
]


def family(names=NAMES, num_targets=2):
    """A base of zeros, and targets that are 1, 2, ... everywhere: merged values are sums of weights."""
    base = {name: torch.zeros(4) for name in names}
    return base, [{name: torch.full((4,), j + 1.0) for name in names} for j in range(num_targets)]


def merged_values(method="task_arithmetic", **parameters):
    base, targets = family()
    merged = merge_state_dicts(method, base, targets, **parameters)
    assert all(bool((tensor == tensor[0]).all()) for tensor in merged.values())
    return {name: float(tensor[0]) for name, tensor in merged.items()}


def test_the_first_pattern_that_fits_decides():
    values = merged_values(weight={"*layers.0.*": 1.0, "*mlp*": [0.5, 0.25], "*": 0.0})
    assert values["model.layers.0.mlp.weight"] == 3.0
    assert values["model.layers.3.mlp.weight"] == 1.0
    assert values["model.layers.3.attn.weight"] == values["lm_head.weight"] == 0.0


def test_a_gradient_goes_from_the_embeddings_to_the_head():
    values = merged_values(weight={"gradient": [0.0, 1.0, 0.0]})
    by_layer = [values[f"model.layers.{layer}.mlp.weight"] for layer in range(5)]
    assert by_layer == pytest.approx([0.0, 1.5, 3.0, 1.5, 0.0])
    rising = merged_values(weight={"gradient": [0.1, 0.9]})
    assert rising["model.embed_tokens.weight"] == pytest.approx(0.3)
    assert rising["lm_head.weight"] == rising["model.norm.weight"] == pytest.approx(2.7)


def test_anchors_may_be_one_for_each_target():
    values = merged_values(weight={"gradient": [[1.0, 0.0], 0.5, [0.0, 1.0]]})
    by_layer = [values[f"model.layers.{layer}.attn.weight"] for layer in range(5)]
    assert by_layer == pytest.approx([1.0, 1.25, 1.5, 1.75, 2.0])


def test_a_pattern_may_hold_a_gradient():
    values = merged_values(weight={"*mlp*": {"gradient": [0, 1]}, "*": 0.5})
    assert [values[f"model.layers.{layer}.mlp.weight"] for layer in range(5)] == pytest.approx([0, 0.75, 1.5, 2.25, 3])
    assert values["model.layers.1.attn.weight"] == 1.5


def test_slerp_goes_over_the_layers():
    base, targets = family()
    targets = [{name: torch.nn.functional.one_hot(torch.tensor(j), 4).float() for name in base} for j in range(2)]
    merged = merge_state_dicts("slerp", None, targets, t={"gradient": [0, 1]})
    assert torch.equal(merged["model.layers.0.mlp.weight"], targets[0]["lm_head.weight"])
    torch.testing.assert_close(merged["model.layers.2.mlp.weight"], torch.tensor([0.5**0.5, 0.5**0.5, 0, 0]))
    torch.testing.assert_close(merged["model.layers.4.mlp.weight"], targets[1]["lm_head.weight"])


@pytest.mark.parametrize(
    ("name", "option"),
    [
        (name, option)
        for name in DATA_FREE
        for option, about in options_of(load_method(name)).items()
        if isinstance(about.default, int | float) and not isinstance(about.default, bool)
    ],
)
def test_every_number_may_vary(name, option):
    """The same value everywhere, however it is written, merges alike."""
    default = options_of(load_method(name))[option].default
    generator = torch.Generator().manual_seed(1)
    shapes = {"model.layers.0.w": (6, 5), "model.layers.1.w": (6, 5), "model.norm": (5,)}
    base, *targets = (
        {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
        for _ in range(1 + width(name, 2))
    )
    plain = merge_state_dicts(name, base, targets, **{option: default})
    forms = [{"*layers*": default, "*": default}]
    forms += [{"gradient": [default, default]}] if isinstance(default, float) else []
    for form in forms:
        varied = merge_state_dicts(name, base, targets, **{option: form})
        assert all(torch.equal(varied[key], plain[key]) for key in base)


@pytest.mark.parametrize(
    ("method", "parameters", "problem"),
    [
        ("linear", {"weight": {}}, "weight is an empty mapping"),
        ("linear", {"weight": {"*": "x"}}, r"weight\['\*'\] must be a number or a list of numbers, got 'x'"),
        ("linear", {"weight": {"*mlp*": {"*": 1.0}}}, r"weight\['\*mlp\*'\] must be a value or a gradient"),
        ("linear", {"weight": {"*": [1.0, 2.0, 3.0]}}, r"weight\['\*'\] lists 3 numbers for 2 targets"),
        ("linear", {"weight": {"gradient": [1.0]}}, "two or more anchors"),
        ("linear", {"weight": {"gradient": 1.0}}, "two or more anchors"),
        ("linear", {"weight": {"gradient": [1.0, None]}}, "anchor 1 must be a number"),
        ("linear", {"weight": {"gradient": [1.0, {"*": 1.0}]}}, "anchor 1 must be a number"),
        ("sce", {"tau": {"*mlp*": 1.5, "*": 1.0}}, r"tau\['\*mlp\*'\] must be a number from 0 to 1, got 1.5"),
        ("sce", {"tau": [0.1, 0.9]}, r"over the layers: tau=\{gradient: \[FIRST, ..., LAST\]\}"),
        ("sce", {"renormalize": {"*": True}}, "renormalize must be true or false"),
        ("varm", {"unit": {"*": "matrix"}}, "unit must be one of"),
        ("ties", {"trim": "model", "density": {"gradient": [0.1, 0.9]}}, "density must be the same for all tensors"),
    ],
)
def test_values_that_make_no_sense(method, parameters, problem):
    with pytest.raises(UserError, match=problem) as caught:
        merge_state_dicts(method, *family(), **parameters)
    assert len(caught.value.problems) == 1
    assert check_parameters(method, parameters, num_targets=2) == caught.value.problems


@pytest.mark.parametrize(
    ("weight", "problem"),
    [
        ({"*mpl*": 1.0, "*": 0.5}, r"weight: pattern '\*mpl\*' fits no tensor; there are 'lm_head.weight'"),
        ({"*": 0.5, "*mlp*": 1.0}, r"pattern '\*mlp\*' comes behind patterns that fit all its tensors"),
        ({"*mlp*": 1.0}, r"no pattern fits 'lm_head.weight', 'model.embed_tokens.weight', .* and 5 more: add '\*'"),
        ({"*norm*": [1.0, -1.0], "*": 0.5}, r"at 'model.norm.weight': weight \[1.0, -1.0\] sums to zero"),
        ({"gradient": [[1, -1], [2, 2]]}, r"at 'model.layers.0.attn.weight': weight .* sums to zero"),
    ],
)
def test_values_that_do_not_fit_the_model(weight, problem):
    with pytest.raises(UserError, match=problem):
        merge_state_dicts("linear", *family(), weight=weight)


def test_a_gradient_needs_layers():
    with pytest.raises(UserError, match="weight: a gradient needs numbered layers, but there are only 'a', 'b'"):
        merge_state_dicts("linear", *family(["a", "b"]), weight={"gradient": [0.1, 0.2]})


def test_records_keep_the_order_of_patterns(tmp_path):
    weight = {"*mlp*": 0.5, "*0*": {"gradient": [1, 0]}, "*": 0.25}
    base, targets = family()
    written = {"patterns": [["*mlp*", 0.5], ["*0*", {"gradient": [1, 0]}], ["*", 0.25]]}
    assert merge_deltas("linear", base, targets, weight=weight).report.parameters["weight"] == written
    folders = [save_model(tmp_path / name, state) for name, state in zip("bcd", [base, *targets], strict=True)]
    merge_folders("linear", folders[0], folders[1:], tmp_path / "out", weight=weight)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["parameters"]["weight"] == written
    one, other = (
        MergeConfig(merge={"method": "linear", "weight": dict(order)}).result_settings()
        for order in (weight.items(), reversed(weight.items()))
    )
    assert json.dumps(one["merge"], sort_keys=True) != json.dumps(other["merge"], sort_keys=True)


def test_depths_are_counted_in_each_stack():
    names = ["encoder.layers.0.w", "encoder.layers.2.w", "decoder.layers.10.w", "decoder.layers.5.w", "h.0.moe.7.w"]
    assert list(depths_of(names).values()) == [0.0, 1.0, 1.0, 0.5, 0.0]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.embed_tokens.weight", True),
        ("gpt_neox.embed_in.weight", True),
        ("embed_out.weight", False),
        ("transformer.wte.weight", True),
        ("transformer.word_embeddings.weight", True),
        ("transformer.word_embeddings_layernorm.weight", False),
        ("lm_head.weight", False),
        ("model.layers.0.embed.weight", False),
    ],
)
def test_embeddings_are_known_by_their_names(name, expected):
    assert is_embedding(name) is expected


def test_interpolated_values_stay_between_their_anchors():
    gradient = varying({"gradient": [0.1, 0.7, 0.7]})
    values = [value_at(gradient, "w", step / 1000) for step in range(1001)]
    assert values == sorted(values)
    assert (values[0], values[-1]) == (0.1, 0.7)
