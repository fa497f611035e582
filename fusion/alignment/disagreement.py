"""How often the authors' dynamic-programming path puts other rows side by side than exact bytes do."""

import json
from pathlib import Path

from fusion.alignment.corpus import Corpus
from fusion.alignment.counting import COUNTING
from fusion.alignment.sequence import BytePath, DtwPath
from fusion.alignment.vocabularies import VocabularyPair
from fusion.cache import cached_folder, code_version, write_json

STAGE = "paths"
FILE = "disagreement.json"
CODE = (*COUNTING, "fusion.alignment.disagreement", "fusion.alignment.sequence")


def disagreement(corpus: Corpus, sample: int, cache: Path) -> dict[str, object] | None:
    """Both paths over the `sample` dialogues with the lowest content hashes, or what is known of them; None for 0.

    Of the pivot's supervised rows (`rows`) bytes give a source row to `byte_rows`. Shares of these: the path names
    `another_row` (its image's last piece), or none (`no_row`). Share of all other rows: the path names a row although
    no row of the source has read the same (`unread_row`). https://arxiv.org/abs/2401.10491 (section 3.2)
    """
    if not sample:
        return None
    chosen = corpus.first(sample)

    def build(folder: Path) -> None:
        write_json(folder / FILE, _compare(chosen))

    folder = cached_folder(cache, STAGE, {**chosen.key(), "code": code_version(*CODE)}, build)
    return json.loads((folder / FILE).read_text("utf-8"))


def _compare(corpus: Corpus) -> dict[str, object]:
    pivot, source = corpus.pivot, corpus.source
    pair = VocabularyPair.of(pivot.tokenizer, source.tokenizer, pivot.end_of_turn_id, source.end_of_turn_id)
    exact, published = BytePath(), DtwPath(pair)
    rows = byte_rows = another = none = unread = 0
    for name in corpus.names:
        text = corpus[name]
        both = text.all_rows()
        by_bytes_R, by_path_R = (path.walk(*both).rows_R[text.pivot.rows_R] for path in (exact, published))
        known_R = by_bytes_R >= 0
        rows += len(known_R)
        byte_rows += int(known_R.sum())
        another += int((known_R & (by_path_R >= 0) & (by_path_R != by_bytes_R)).sum())
        none += int((known_R & (by_path_R < 0)).sum())
        unread += int((~known_R & (by_path_R >= 0)).sum())
    return {
        "dialogues": len(corpus.names),
        "rows": rows,
        "byte_rows": byte_rows,
        "another_row": _share(another, byte_rows),
        "no_row": _share(none, byte_rows),
        "unread_row": _share(unread, rows - byte_rows),
    }


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 6) if whole else None
