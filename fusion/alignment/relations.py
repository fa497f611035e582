"""How the token that a pivot row predicts lies to the source's cut of the same bytes.

Legend: R rows of the pivot, S rows of the source, all of one dialogue.
"""

import numpy as np

from fusion.alignment.rows import UNALIGNED, UNKNOWN, Rows, boundary_rows, inner_rows

RELATIONS = ("1-1", "1-n", "n-1", "inner", "unread", "unproven")
"""
- `1-1`: it starts and ends where one token of the source does.
- `1-n`: it starts where a source token does and goes on behind that token's end, so several source tokens stand beside
  it; the last of them may reach further than it does.
- `n-1`: it starts where a source token does and ends inside of it, so several pivot tokens make up what the source
  reads at once; it is the first of them.
- `inner`: it starts inside a source token.
- `unread`: the source's reading ends before it (a dialogue that was cut to `max_length`).
- `unproven`: nobody knows, because the tokeniser's offsets prove no boundary there.
"""
ONE_ONE, ONE_MANY, MANY_ONE, INNER, UNREAD, UNPROVEN = range(len(RELATIONS))


def relations(pivot: Rows, source: Rows) -> np.ndarray:
    """int8 [R]: place in `RELATIONS`, for all rows of a dialogue; the pivot's last row, which predicts nothing, too.

    Tokens of the source that have no width in the text (a template's, a dummy prefix) are no tokens here.
    """
    rows_R = boundary_rows(pivot.ends, source.ends)
    ends_R = np.append(pivot.ends[1:], UNKNOWN)[: len(pivot)]
    there_R = np.append(source.ends[1:], UNKNOWN)[rows_R]  # end of the source token that starts at the row's place
    known_R = (rows_R >= 0) & (ends_R >= 0) & (there_R >= 0)
    last = int(source.ends[-1]) if len(source) else 0
    return np.select(
        [
            known_R & (there_R == ends_R),
            known_R & (there_R < ends_R),
            known_R & (there_R > ends_R),
            inner_rows(pivot.ends, source.ends) != UNALIGNED,
            (pivot.ends >= last) & (last >= 0),
        ],
        [ONE_ONE, ONE_MANY, MANY_ONE, INNER, UNREAD],
        UNPROVEN,
    ).astype(np.int8)
