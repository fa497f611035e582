"""Content-addressed folders: work that is finished is never done twice, and never seen half-done."""

from fusion.cache.atomic import fsync_tree, write_bytes, write_json, write_text
from fusion.cache.digests import FileState, file_hash, keep_digests, known_digest, remember
from fusion.cache.fingerprint import (
    canonical_json,
    code_version,
    fingerprint,
    folder_hash,
    source_version,
)
from fusion.cache.folder import cached_folder
from fusion.cache.shared import Pieces, make_share, shared_folder
from fusion.cache.users import begin_uses, end_uses, record_uses

__all__ = [
    "FileState",
    "Pieces",
    "begin_uses",
    "cached_folder",
    "canonical_json",
    "code_version",
    "end_uses",
    "file_hash",
    "fingerprint",
    "folder_hash",
    "fsync_tree",
    "keep_digests",
    "known_digest",
    "make_share",
    "record_uses",
    "remember",
    "shared_folder",
    "source_version",
    "write_bytes",
    "write_json",
    "write_text",
]
