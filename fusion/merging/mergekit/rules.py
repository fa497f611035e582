"""What each merge method of mergekit 0.1.5 is here: its parameters, its inputs, and what comes out differently."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

REQUIRED = object()
"""mergekit has no default for it."""


@dataclass(frozen=True)
class Parameter:
    """A parameter of mergekit's. `ours`: its name here, None where there is nothing to set."""

    ours: str | None
    default: object = REQUIRED
    scope: Literal["model", "each", "all"] = "model"
    """One value for the model, or one for each target: `each` but the base, or for `all` inputs."""
    varies: bool = True
    """Gradients and filters can be kept."""
    words: Mapping[object, object] | None = None
    """What a value is here; others are refused."""


@dataclass(frozen=True)
class Rule:
    """`targets`: the inputs but the base; with the base as `first` of two; or with the base as one of `all`."""

    ours: str
    parameters: Mapping[str, Parameter]
    targets: Literal["others", "first", "all"] = "others"
    base: Literal["required", "optional", "unused"] = "required"
    fixed: Mapping[str, object] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


WEIGHT = Parameter("weight", scope="each")
DENSITY = Parameter("density", 1.0, "each")
GAMMA = Parameter("gamma", 0.01, "each")
EPSILON = Parameter("epsilon", 0.15, "each")
LAMBDA = Parameter("scale", 1.0, varies=False)
NOT_RESCALED = Parameter(None, False, words={False: None})
RESCALED = Parameter("rescale", True, words={True: "l1"})
UNUSED = Parameter(None, None)
BY_L1 = "what is kept keeps each tensor's L1 norm (rescale=l1), as in mergekit; the paper: merge.rescale=density"
RANDOM = "dropping at random is decided by `seed`: other elements are dropped than by mergekit"
RAM_EPSILON = Parameter("epsilon", 1e-5)


def _normalize(default: bool) -> Parameter:
    return Parameter("normalize", default, varies=False)


def _deltas(ours: str, *, normalize: bool, rescale: Parameter, notes: tuple[str, ...] = (), **more: Parameter) -> Rule:
    """Task arithmetic and its kin."""
    parameters = {"weight": WEIGHT, "normalize": _normalize(normalize), "lambda": LAMBDA, "rescale": rescale}
    return Rule(ours, {**parameters, **more}, notes=notes)


RULES = {
    "linear": Rule(
        "linear",
        {"weight": Parameter("weight", scope="all"), "normalize": _normalize(True)},
        targets="all",
        base="unused",
    ),
    "slerp": Rule("slerp", {"t": Parameter("t")}, targets="first"),
    "nuslerp": Rule(
        "nuslerp",
        {
            "weight": WEIGHT,
            "nuslerp_flatten": Parameter("unit", True, words={True: "tensor", False: "row"}),
            "nuslerp_row_wise": Parameter(None, False, words={False: None}),
        },
        base="optional",
    ),
    "multislerp": Rule(
        "multislerp",
        {"weight": WEIGHT, "normalize_weights": Parameter(None, True, words={True: None})},
        base="optional",
        notes=("no step in the tangent space is taken: with weights that sum to 1 its length is zero",),
    ),
    "karcher": Rule(
        "karcher",
        {
            "max_iter": Parameter("max_iterations", 10, varies=False),
            "tol": Parameter("tolerance", 1e-5, varies=False),
        },
        targets="all",
        base="unused",
    ),
    "passthrough": Rule(
        "passthrough",
        {"scale": Parameter(None, None, words={None: None, 1: None})},
        targets="all",
        base="unused",
    ),
    "nearswap": Rule("nearswap", {"t": Parameter("t")}),
    "arcee_fusion": Rule(
        "arcee_fusion",
        {},
        notes=("quantiles are exact, and divergences in float64: mergekit samples the quantiles of large tensors",),
    ),
    "ram": Rule("ram", {"epsilon": RAM_EPSILON}, fixed={"boost": 0.0}),
    "ramplus_tl": Rule(
        "ram", {"epsilon": RAM_EPSILON, "r": Parameter("boost", 0.1), "alpha": Parameter("limit", 0.2)}
    ),
    "model_stock": Rule(
        "model_stock",
        {"filter_wise": Parameter("unit", False, words={False: "tensor", True: "row"})},
        fixed={"compat": "mergekit"},
        notes=(
            "short deltas, such as those of norms, count as orthogonal (compat=mergekit), as in mergekit; the paper: "
            "merge.compat=none",
        ),
    ),
    "sce": Rule(
        "sce_mergekit",
        {"select_topk": Parameter("tau", 1.0)},
        notes=(
            "coefficients are uniform where mean squared deltas sum to less than 1e-6, which ordinary fine-tunes do "
            "(merge=sce_mergekit), as in mergekit; the paper: merge=sce, with the same tau",
        ),
    ),
    "task_arithmetic": _deltas("task_arithmetic", normalize=False, rescale=UNUSED, density=UNUSED),
    "ties": _deltas(
        "ties",
        normalize=True,
        rescale=NOT_RESCALED,
        density=DENSITY,
        notes=("of equal deltas those of lowest index are kept; mergekit's sort leaves that open",),
    ),
    "dare_linear": _deltas("dare_linear", normalize=False, rescale=RESCALED, density=DENSITY, notes=(BY_L1, RANDOM)),
    "dare_ties": _deltas("dare_ties", normalize=False, rescale=RESCALED, density=DENSITY, notes=(BY_L1, RANDOM)),
    "della_linear": _deltas(
        "della_linear", normalize=False, rescale=RESCALED, density=DENSITY, epsilon=EPSILON, notes=(BY_L1, RANDOM)
    ),
    "della": _deltas(
        "della", normalize=True, rescale=RESCALED, density=DENSITY, epsilon=EPSILON, notes=(BY_L1, RANDOM)
    ),
    "breadcrumbs": _deltas("breadcrumbs", normalize=False, rescale=NOT_RESCALED, density=DENSITY, gamma=GAMMA),
    "breadcrumbs_ties": _deltas(
        "breadcrumbs_ties", normalize=False, rescale=NOT_RESCALED, density=DENSITY, gamma=GAMMA
    ),
}
