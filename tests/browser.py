"""A real browser for pages; who asks for it is skipped where Playwright or a browser is missing."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

NAMES = ("chromium", "google-chrome", "chrome")
LONGEST_MS = 300_000  # a busy machine may take a minute to open a browser


@dataclass
class Watched:
    """A page, and what it complained about and asked the network for."""

    page: Any
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.set_default_timeout(LONGEST_MS)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", lambda line: self.complaints.append(line.text) if line.type == "error" else None)
        self.page.on("request", lambda request: self.requests.append(request.url))


@contextmanager
def open_browser() -> Iterator[Any]:
    """A headless Chromium, or the reason for which there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next((found for name in NAMES if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"no browser is installed ({', '.join(NAMES)})")
    with playwright.sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=path, args=["--no-sandbox"], timeout=LONGEST_MS)
        yield browser
        browser.close()
