"""SHA-256 of large files, taken right behind a merge that reads or writes them, while they are still in memory."""

import hashlib
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from fusion.cache import FileState, known_digest, remember

PIECE = 1 << 20
STEP = 32 << 20


class FileDigest:
    """The SHA-256 of one file, from its beginning up to where it was told to go."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.told = 0
        self._hash, self._position, self._lock = hashlib.sha256(), 0, threading.Lock()

    def advance(self, end: int) -> None:
        """Read on to `end`; the file must be final up to there. Calls from several threads wait for each other."""
        with self._lock:
            if end <= self._position:
                return
            with self.path.open("rb", buffering=0) as file:
                file.seek(self._position)
                piece = memoryview(bytearray(PIECE))
                while self._position < end:
                    num_bytes = file.readinto(piece[: end - self._position])
                    if not num_bytes:
                        raise OSError(f"{self.path}: became shorter while it was read")
                    self._hash.update(piece[:num_bytes])
                    self._position += num_bytes

    def finish(self) -> str:
        self.advance(os.path.getsize(self.path))
        return self._hash.hexdigest()


class Digests:
    """Digests of several files, taken by threads of their own for the time of a `with` block; none unless `wanted`."""

    def __init__(self, threads: int, wanted: bool = True) -> None:
        self._wanted = wanted
        self._pool = ThreadPoolExecutor(threads, "digest")
        self._digests: dict[Path, FileDigest] = {}
        self._running: list[Future[None]] = []

    def __enter__(self) -> "Digests":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def follow(self, path: Path, end: int) -> None:
        """The bytes of `path` before `end` are final, and were just read or written."""
        if not self._wanted:
            return
        digest = self._digests.setdefault(path, FileDigest(path))
        if end - digest.told >= STEP and known_digest(FileState.of(path)) is None:
            digest.told = end
            self._running.append(self._pool.submit(digest.advance, end))

    def all_of(self, inputs: Mapping[Path, FileState], outputs: list[Path]) -> dict[Path, str]:
        """The digests of all files, in full. Those of inputs are remembered, unless they left the states given."""
        if not self._wanted:
            return {}
        known = {path: known_digest(state) for path, state in inputs.items()}
        finish: Callable[[Path], str] = lambda path: self._digests.setdefault(path, FileDigest(path)).finish()  # noqa: E731
        for future in self._running:
            future.result()
        missing = [path for path, digest in known.items() if digest is None] + outputs
        found = dict(zip(missing, self._pool.map(finish, missing), strict=True))
        for path in inputs.keys() & found.keys():
            remember(inputs[path], found[path])
        return {path: digest for path, digest in known.items() if digest is not None} | found
