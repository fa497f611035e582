import numpy as np


def source_only(ce_UM: np.ndarray) -> np.ndarray:
    """The source with the lowest cross-entropy speaks, the pivot never: the control for MinCE."""
    return np.eye(ce_UM.shape[1])[1 + ce_UM[:, 1:].argmin(axis=1)]
