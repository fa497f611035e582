"""Sparse rows to and from tables: one {id: weight} per row."""

import numpy as np

from fusion.teaching.sparse_rows import loose_rows


def rows_of(*rows):
    """Sparse rows as given, not scaled."""
    loose = [(number, token, mass) for number, row in enumerate(rows) for token, mass in row.items()]
    columns = [np.asarray(column) for column in zip(*loose, strict=True)] if loose else [np.zeros(0, int)] * 3
    return loose_rows(columns[0], columns[1], columns[2], len(rows))


def as_dicts(rows):
    ids, weights = rows.padded(max(1, int(np.diff(rows.indptr_R).max())))
    return [{int(i): float(w) for i, w in zip(*row, strict=True) if w > 0} for row in zip(ids, weights, strict=True)]
