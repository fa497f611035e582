"""Merging in parameter space: the targets of one pivot become one model.

`merge_state_dicts` and `merge_folders` do it; `merge_deltas` keeps the merged delta apart, so that a search over
`scale` needs one merge. Functions called `_together` read the inputs once for several merges. A method is one file in
`fusion.merging.methods`, or any function of yours marked with `merge_method`. Names are imported on first use:
`python -m fusion.merging.verify` needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusion.merging.deltas import Block, ModelDeltas, TensorDeltas
    from fusion.merging.engine import MergedDeltas, merge_deltas, merge_deltas_together, merge_state_dicts
    from fusion.merging.evidence import Evidence
    from fusion.merging.folders import merge_folders, merge_folders_together
    from fusion.merging.measuring.measure import measure
    from fusion.merging.measuring.study import Study
    from fusion.merging.method import MergedDelta, MergeMethod, load_method, merge_method, method_names
    from fusion.merging.parameters import check_parameters
    from fusion.merging.plan import MergeRequest
    from fusion.merging.report import MergeReport
    from fusion.merging.search import ScaleSearch, search_scale

__all__ = [
    "Block",
    "Evidence",
    "MergeMethod",
    "MergeReport",
    "MergeRequest",
    "MergedDelta",
    "MergedDeltas",
    "ModelDeltas",
    "ScaleSearch",
    "Study",
    "TensorDeltas",
    "check_parameters",
    "load_method",
    "measure",
    "merge_deltas",
    "merge_deltas_together",
    "merge_folders",
    "merge_folders_together",
    "merge_method",
    "merge_state_dicts",
    "method_names",
    "search_scale",
]

_MODULES = {
    "deltas": ("Block", "ModelDeltas", "TensorDeltas"),
    "engine": ("MergedDeltas", "merge_deltas", "merge_deltas_together", "merge_state_dicts"),
    "evidence": ("Evidence",),
    "folders": ("merge_folders", "merge_folders_together"),
    "measuring.measure": ("measure",),
    "measuring.study": ("Study",),
    "method": ("MergeMethod", "MergedDelta", "load_method", "merge_method", "method_names"),
    "parameters": ("check_parameters",),
    "plan": ("MergeRequest",),
    "report": ("MergeReport",),
    "search": ("ScaleSearch", "search_scale"),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
