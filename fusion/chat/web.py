"""The chat on a page of this machine: no network, no scripts from elsewhere, answers stream as they are written."""

import json
import logging
import secrets
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from fusion.chat.speaker import Speaker
from fusion.config import UserError
from fusion.dialogues.template import UnrenderableDialogue

HOST = "127.0.0.1"
PAGE = Path(__file__).with_name("page.html")
LONGEST_QUESTION = 100_000
log = logging.getLogger(__name__)


def serve(speakers: Sequence[Speaker], port: int) -> None:
    """Serve until interrupted. Raises UserError where the port is taken."""
    server = make_server(speakers, port)
    print(f"http://{HOST}:{server.server_address[1]}/  (Ctrl-C ends)", flush=True)
    with server:
        server.serve_forever()


def make_server(speakers: Sequence[Speaker], port: int) -> ThreadingHTTPServer:
    """A server on this machine's own address; only pages that it has served may ask the models."""
    token = secrets.token_urlsafe(16)
    locks = [threading.Lock() for _ in speakers]
    handler = type("Handler", (_Handler,), {"speakers": list(speakers), "locks": locks, "token": token})
    try:
        return ThreadingHTTPServer((HOST, port), handler)
    except OSError as error:
        raise UserError(f"--port {port}: {error}; choose another, 0 takes any that is free") from error


class _Handler(BaseHTTPRequestHandler):
    """GET / is the page; POST /ask streams one model's answer as lines of JSON; POST /new begins a new talk."""

    speakers: list[Speaker]
    locks: list[threading.Lock]
    token: str

    def log_message(self, format: str, *args: Any) -> None:
        log.debug(format, *args)

    def do_GET(self) -> None:
        if self.path != "/" or not self._is_asked_here():
            self.send_error(404)
            return
        facts = {"models": [one.name for one in self.speakers], "token": self.token}
        safe = json.dumps(facts).replace("<", "\\u003c")
        page = PAGE.read_text("utf-8").replace("/*FACTS*/", safe).encode("utf-8")
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(page)))
        self.send_header(
            "Content-Security-Policy",
            "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'",
        )
        self.end_headers()
        self.wfile.write(page)

    def _is_asked_here(self) -> bool:
        """Whether the browser knows this server by its own name: other names may be a stranger's page."""
        return self.headers.get("Host", "").partition(":")[0] in (HOST, "localhost")

    def do_POST(self) -> None:
        asked = self._body()
        if asked is None:
            return
        if self.path == "/new":
            for speaker, lock in zip(self.speakers, self.locks, strict=True):
                with lock:
                    speaker.forget()
            self._start_stream()
        elif self.path == "/ask":
            self._answer(asked)
        else:
            self.send_error(404)

    def _body(self) -> dict[str, Any] | None:
        """What the page sends; None, and the reason is told, where it comes from elsewhere or cannot be read."""
        if self.headers.get("X-Token") != self.token:
            self.send_error(403)
            return None
        try:
            size = int(self.headers.get("Content-Length", "0"))
            found = json.loads(self.rfile.read(size)) if 0 < size <= LONGEST_QUESTION else None
        except ValueError:
            found = None
        if not isinstance(found, dict):
            self.send_error(400)
            return None
        return found

    def _answer(self, asked: dict[str, Any]) -> None:
        number, question = asked.get("model"), asked.get("question")
        if not isinstance(number, int) or not 0 <= number < len(self.speakers) or not isinstance(question, str):
            self.send_error(400)
            return
        self._start_stream()
        with self.locks[number]:
            try:
                for piece in self.speakers[number].answer(question):
                    self._line({"text": piece})
            except UnrenderableDialogue as error:
                self._line({"error": str(error)})
            except (BrokenPipeError, ConnectionResetError):  # the page was closed
                return
            else:
                self._line({"end": True})

    def _start_stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()

    def _line(self, value: dict[str, Any]) -> None:
        self.wfile.write((json.dumps(value, ensure_ascii=False) + "\n").encode("utf-8"))
        self.wfile.flush()
