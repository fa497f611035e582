"""Token alignment: source distributions, over the source's tokens, become distributions over the pivot's.

Sequence dimension: which source row has read what a pivot row has read (`boundary_rows`, `dtw_path`). Vocabulary
dimension: what a source token is among the pivot's (`MappingStatistics`, the strategies of `build_alignment`).
"""

from fusion.alignment.alignment import Alignment, MappedRows, Spoken, build_alignment
from fusion.alignment.dtw import dtw_path
from fusion.alignment.rows import Rows, boundary_rows
from fusion.alignment.statistics import MappingStatistics
from fusion.alignment.target_kind import TargetKind
from fusion.alignment.vocabularies import VocabularyPair
from fusion.dialogues.token_bytes import TokenBytes, token_bytes

__all__ = [
    "Alignment",
    "MappedRows",
    "MappingStatistics",
    "Rows",
    "Spoken",
    "TargetKind",
    "TokenBytes",
    "VocabularyPair",
    "boundary_rows",
    "build_alignment",
    "dtw_path",
    "token_bytes",
]
