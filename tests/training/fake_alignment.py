"""An alignment of any kind, made up: what fusion and training make of it can then be said exactly."""

from pathlib import Path

import numpy as np

from fusion.alignment.target_kind import TargetKind
from fusion.cache import fingerprint
from fusion.teaching.sparse_rows import loose_rows


class FakeAligned(dict):
    """Content hash -> rows, none of them scaled, some of them empty."""

    def __init__(self, kind, folder, rows):
        super().__init__(rows)
        self.kind, self.folder, self.report = kind, folder, {"aligned": 1.0}


def fake_align_pair(kind):
    """A stand-in for `align_pair` whose rows are drawn by the source's name and the dialogue."""

    def align_pair(pivot, source, pivot_tokens, source_tokens, teacher, names, settings, cache):
        rows = {}
        for name in names:
            tokens = pivot_tokens[name]
            draw = np.random.default_rng([int(name[:8], 16), len(source.model.name)])
            rows[name] = made_up(kind, tokens.ids_N[tokens.rows_R + 1], draw)
        folder = Path(fingerprint({"kind": kind.to_json(), "source": source.model.name}))
        return FakeAligned(kind, folder, rows)

    return align_pair


def made_up(kind: TargetKind, references_R, draw):
    rows = len(references_R)
    empty_R = draw.random(rows) < 0.2
    if kind.name == "spans":
        starts_R = draw.random(rows) < 0.5
        starts_R[0] = True
        span_R = np.maximum.accumulate(np.where(starts_R, np.arange(rows), 0))
        weights_R = draw.uniform(0.1, 1, rows)[span_R] * ~empty_R[span_R]
        return loose_rows(np.arange(rows), span_R, weights_R, rows)
    row_E = np.repeat(np.arange(rows), 3)
    known_R = draw.random(rows) < 0.6  # the others give the reference no mass
    ids_RK = np.column_stack([np.where(known_R, references_R, 4), draw.integers(5, 50, (rows, 2))])
    if kind.name == "ranks":
        ids_RK = np.tile(np.arange(3), (rows, 1))
    weights_RK = -np.sort(-draw.dirichlet(np.full(4, 0.5), rows)[:, :3], axis=1) * ~empty_R[:, None]
    return loose_rows(row_E, ids_RK.ravel(), weights_RK.ravel(), rows)
