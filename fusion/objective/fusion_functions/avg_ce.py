import numpy as np


def avg_ce(ce_UM: np.ndarray) -> np.ndarray:
    """All models speak, each with its share of softmax(-CE); where every cross-entropy is infinite, the pivot alone.

    AvgCE of FuseLLM: https://arxiv.org/abs/2401.10491
    """
    best_U1 = ce_UM.min(axis=1, keepdims=True)
    pivot_U1 = np.isinf(best_U1)
    weights_UM = np.exp(-np.subtract(ce_UM, best_U1, out=np.full(ce_UM.shape, np.inf), where=~pivot_U1))
    weights_UM[pivot_U1[:, 0], 0] = 1
    return weights_UM / weights_UM.sum(axis=1, keepdims=True)
