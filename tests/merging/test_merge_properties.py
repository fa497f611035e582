"""What must hold for every method of the package, whatever the numbers; what a method is excused from, it says why."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st
from merge_inputs import save_model, width
from torch import Tensor

from fusion.config.compose import CONFIG_FOLDER, register, to_settings
from fusion.config.schema import EngineConfig, MergeConfig
from fusion.merging import Evidence, deltas, load_method, merge_deltas, merge_state_dicts, method_names
from fusion.merging.checkpoints.checkpoint import open_checkpoint

SHAPES = {"model.embed_tokens.weight": (9, 6), "model.layers.0.mlp.weight": (8, 6), "model.norm.weight": (6,)}
MANY_BLOCKS = {"model.embed_tokens.weight": (3, 4000), "model.layers.0.mlp.weight": (90, 70), "model.bias": (5000,)}
MEBI = 1 << 20
State = dict[str, Tensor]

PLACES = "masks are keyed by the target's place"
DROPS = "drops a part of every target"
PAIRS = "takes two targets"
NOT_ITSELF = "evens out singular values, also those of one target"
OTHER_ORDER = dict.fromkeys(["dare_linear", "dare_ties", "della", "della_linear"], PLACES)
NOT_THE_ONE = {
    **dict.fromkeys(["dare_linear", "dare_ties", "della", "della_linear", "ties"], DROPS),
    **dict.fromkeys(["breadcrumbs", "breadcrumbs_ties", "arcee_fusion", "nearswap"], DROPS),
    **dict.fromkeys(["slerp", "nuslerp"], PAIRS),
    "task_arithmetic": "does not divide its weights of 0.3 by their sum",
    **dict.fromkeys(["learned", "fisher_learned"], "has whatever coefficients were learned"),
    "iso_c": NOT_ITSELF,
    "ram": "does not see deltas below epsilon",
}
NOT_THE_SAME = {name: why for name, why in NOT_THE_ONE.items() if why != PAIRS} | {
    "tsv_m": "takes the targets' directions apart, also equal ones",
    "wudi": "starts at the sum of the deltas",
    "passthrough": "takes one target",
}
NOT_BY_SIZE = {
    "arcee_fusion": "the softmax of a row is not linear",
    "nearswap": "compares deltas with t, in units of weights",
    "ram": "compares deltas with epsilon, in units of weights",
    "sce_mergekit": "has uniform coefficients below a fixed size",
}
NOT_BY_SIGN = {"arcee_fusion": "the divergence from the base is not that from the target"}
SUMS_IN_RUNS = "sums of squares add up in float32 within runs of 1,024 elements, which begin with a block"
MOVES_WITH_BLOCKS = dict.fromkeys(["sce", "sce_released", "sce_mergekit", "varm"], SUMS_IN_RUNS)


def but(*excused: Mapping[str, str]) -> pytest.MarkDecorator:
    """Every method that is not excused."""
    names = {name for reasons in excused for name in reasons}
    assert names <= set(method_names()), "an excuse for a method that does not exist"
    return pytest.mark.parametrize("name", [name for name in method_names() if name not in names])


seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=8)


def drawn(seed: int, num_targets: int, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> list[State]:
    """Deltas of so many targets, each larger than the one before."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {one: 0.01 * (j + 1) * torch.randn(shape, generator=generator) for one, shape in shapes.items()}
        for j in range(num_targets)
    ]


def measured(name: str, shapes: Mapping[str, tuple[int, ...]], places: list[int]) -> Evidence | None:
    """Something that could have been measured on the targets that stood at these places."""
    measure = load_method(name).evidence
    if measure is None:
        return None
    coefficients = dict.fromkeys(shapes, ())
    if measure.__name__ == "learned_coefficients":
        return Evidence(measure.__name__, drawn_evidence(coefficients, places), "made by hand")
    if measure.__name__ == "input_products":
        inputs = {one: (shape[1], shape[1]) for one, shape in shapes.items() if "mlp.weight" in one}
        grams = tuple({one: x @ x.T for one, x in state.items()} for state in drawn_evidence(inputs, places))
        return Evidence(measure.__name__, grams, "made by hand")
    learned = Evidence("learned_coefficients", drawn_evidence(coefficients, places), "made by hand")
    beside = learned if measure.__name__ == "fisher_coefficients" else None
    return Evidence(measure.__name__, drawn_evidence(shapes, places), "made by hand", beside=beside)


def drawn_evidence(shapes: Mapping[str, tuple[int, ...]], places: list[int]) -> tuple[State, ...]:
    """Numbers from 0 to 1 for every target, the same whichever place it stands at now."""
    generators = [torch.Generator().manual_seed(place) for place in places]
    return tuple({one: torch.rand(shape, generator=seed) for one, shape in shapes.items()} for seed in generators)


def merged(name: str, targets: list[State], places: list[int] | None = None) -> State:
    """The merged deltas by the method's defaults, from a base of zeros."""
    shapes = {one: tuple(delta.shape) for one, delta in targets[0].items()}
    evidence = measured(name, shapes, places or list(range(len(targets))))
    base = {one: torch.zeros(shape) for one, shape in shapes.items()}
    return dict(merge_deltas(name, base, targets, evidence=evidence).deltas)


def scaled(states: list[State], factor: float) -> list[State]:
    return [{one: factor * delta for one, delta in state.items()} for state in states]


def assert_near(actual: State, expected: State) -> None:
    """Elements in which large numbers cancel are as exact as the largest ones: drawn numbers have such, too."""
    assert actual.keys() == expected.keys()
    for one, wanted in expected.items():
        atol = max(1e-7, 1e-5 * float(wanted.abs().max()))
        torch.testing.assert_close(actual[one], wanted, rtol=2e-4, atol=atol)


@but(OTHER_ORDER)
@few
@given(seed=seeds)
def test_the_order_of_targets_does_not_matter(name: str, seed: int) -> None:
    targets = drawn(seed, width(name))
    places = list(range(len(targets)))
    assert_near(merged(name, targets[::-1], places[::-1]), merged(name, targets))


@but(NOT_THE_ONE)
@few
@given(seed=seeds)
def test_one_target_is_itself(name: str, seed: int) -> None:
    (target,) = drawn(seed, 1)
    assert_near(merged(name, [target]), target)


@but(NOT_THE_SAME)
@few
@given(seed=seeds)
def test_equal_targets_merge_into_themselves(name: str, seed: int) -> None:
    (target,) = drawn(seed, 1)
    assert_near(merged(name, [target] * width(name)), target)


@but()
@few
@given(seed=seeds)
def test_without_deltas_the_base_stays(name: str, seed: int) -> None:
    (base,) = scaled(drawn(seed, 1), 100)
    targets = [base] * width(name)
    evidence = measured(name, SHAPES, list(range(len(targets))))
    found = merge_deltas(name, base, targets, evidence=evidence)
    for one, delta in found.deltas.items():
        still = 4 * torch.finfo(torch.float32).eps if load_method(name).operands == "weights" else 0
        assert (delta.abs() <= still * base[one].abs()).all()
        assert all(map(torch.isfinite, torch.tensor(found.report.coefficients[one])))


@but(NOT_BY_SIZE)
@few
@given(seed=seeds, factor=st.sampled_from([2.0**-10, 0.5, 1.7, 100.0]))
def test_deltas_of_another_size_give_a_merged_delta_of_that_size(name: str, seed: int, factor: float) -> None:
    targets = drawn(seed, width(name))
    assert_near(merged(name, scaled(targets, factor)), scaled([merged(name, targets)], factor)[0])


@but(NOT_BY_SIGN)
@few
@given(seed=seeds)
def test_opposite_deltas_give_the_opposite_merged_delta(name: str, seed: int) -> None:
    targets = drawn(seed, width(name))
    assert_near(merged(name, scaled(targets, -1)), scaled([merged(name, targets)], -1)[0])


class TestNothingButTheInputsDecides:
    """A vector that blocks cut, rows longer than a block, and a matrix of many blocks, read from files."""

    @pytest.fixture(scope="class")
    def folders(self, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
        (base,), folder = drawn(0, 1, MANY_BLOCKS), tmp_path_factory.mktemp("many")
        targets = [{one: base[one] + delta for one, delta in state.items()} for state in drawn(1, 3, MANY_BLOCKS)]
        return [save_model(folder / str(place), state) for place, state in enumerate([base, *targets])]

    def merge(self, name: str, folders: list[Path], threads: int = 1, memory: int = 1 << 30) -> State:
        base, *targets = (open_checkpoint(folder) for folder in folders[: width(name) + 1])
        evidence = measured(name, MANY_BLOCKS, list(range(len(targets))))
        engine = EngineConfig(threads=threads, memory=f"{-(-memory // MEBI)}MiB")
        return merge_state_dicts(name, base, targets, scale=1.3, seed=5, evidence=evidence, engine=engine)

    @but()
    def test_neither_threads_nor_memory(self, name: str, folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(deltas, "BLOCK_ELEMENTS", 1024)
        whole = max(load_method(name).whole_bytes(one, shape, width(name)) for one, shape in MANY_BLOCKS.items())
        first = self.merge(name, folders)
        for threads, memory in ((2, 1 << 30), (2, max(whole, MEBI)), (1, max(whole, MEBI))):
            again = self.merge(name, folders, threads, memory)
            assert all(torch.equal(first[one], again[one]) for one in first)

    @but(MOVES_WITH_BLOCKS)
    def test_nor_the_size_of_blocks(self, name: str, folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
        first = self.merge(name, folders)
        for size in (1024, 1500, 4096):
            monkeypatch.setattr(deltas, "BLOCK_ELEMENTS", size)
            again = self.merge(name, folders)
            assert all(torch.equal(first[one], again[one]) for one in first), size

    @pytest.mark.parametrize("name", MOVES_WITH_BLOCKS)
    def test_blocks_move_the_last_bit_at_most(
        self, name: str, folders: list[Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = self.merge(name, folders)
        monkeypatch.setattr(deltas, "BLOCK_ELEMENTS", 1500)
        inputs = [open_checkpoint(folder) for folder in folders]
        for one, again in self.merge(name, folders).items():
            last_bit = 2 * torch.finfo(torch.float32).eps * sum(state[one].abs() for state in inputs)
            assert ((again - first[one]).abs() <= last_bit).all()


@but()
def test_the_settings_of_every_method_compose_and_merge(name: str) -> None:
    register()
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        settings = to_settings(compose("merge", overrides=[f"merge={name}"]), MergeConfig)
    chosen = dict(settings.merge)
    method, scale = chosen.pop("method"), chosen.pop("scale")
    base, *targets = drawn(0, width(name) + 1)
    evidence = measured(name, SHAPES, list(range(len(targets))))
    found = merge_state_dicts(method, base, targets, scale=scale, seed=settings.seed, evidence=evidence, **chosen)
    assert found.keys() == base.keys()
    assert all(torch.isfinite(tensor).all() for tensor in found.values())
    assert any(not torch.equal(found[one], base[one]) for one in base)
