"""A real OpenAI-compatible chat server on localhost, which can be told to misbehave."""

import json
import threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "sk-very-secret-0123456789"
KEY_VARIABLE = "FUSION_TEST_JUDGE_KEY"


class ChatServer:
    """Answers with `answer(payload) -> text, (text, log-probabilities of the first token) or (status, body)`.

    `faults` are used up one by one, whichever question comes: 429, 500, "timeout", "malformed", "empty", "cut". A
    question that gets "empty" after two other faults is not asked again, so "empty" should come first.
    """

    def __init__(self, answer, faults=(), key=None):
        self.answer, self.faults, self.key = answer, list(faults), key
        self.payloads, self.seen = [], Counter()
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()

    @property
    def base_url(self):
        return f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def next_fault(self, payload):
        with self.lock:
            self.payloads.append(payload)
            fault = self.faults.pop(0) if self.faults else None
            self.seen[fault] += 1
            return fault

    @contextmanager
    def busy(self):
        """While an answer is thought of; it is over before the answer is sent, and so before the next question."""
        with self.lock:
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            yield
        finally:
            with self.lock:
                self.at_once -= 1

    def reply(self, payload):
        """(status, body)"""
        with self.busy():
            found = self.answer(payload)
        if isinstance(found, tuple) and isinstance(found[0], int):
            return found
        text, first = found if isinstance(found, tuple) else (found, None)
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        if first is not None and payload.get("logprobs"):
            candidates = [{"token": token, "logprob": value} for token, value in first.items()]
            choice["logprobs"] = {"content": [{"token": text[:1], "logprob": 0.0, "top_logprobs": candidates}]}
        size = sum(len(message["content"]) for message in payload["messages"])
        usage = {"prompt_tokens": size, "completion_tokens": len(text)}
        return 200, {"model": f"{payload['model']}-2026", "choices": [choice], "usage": usage}


def handler(chat):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def send(self, status, body, **headers):
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_POST(self):
            payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            given = self.headers.get("Authorization", "")
            if chat.key and given != f"Bearer {chat.key}":
                self.send(401, {"error": {"message": f"Incorrect API key provided: {given}"}})
                return
            fault = chat.next_fault(payload)
            self.respond(fault, payload)

        def respond(self, fault, payload):
            if fault == "timeout":
                self.rfile.read(1)  # until the client hangs up
                self.close_connection = True
            elif isinstance(fault, int):
                self.send(fault, {"error": "not now"}, **({"Retry_After": "0.05"} if fault == 429 else {}))
            elif fault == "malformed":
                self.send(200, b'{"choices": [{"message": ')
            elif fault == "empty":
                _, body = chat.reply(payload)
                body["choices"][0]["message"]["content"] = None
                self.send(200, body)
            elif fault == "cut":
                self.close_connection = True
            else:
                self.send(*chat.reply(payload))

    return Handler


@contextmanager
def chat_server(answer, **settings):
    chat = ChatServer(answer, **settings)
    chat.server = ThreadingHTTPServer(("127.0.0.1", 0), handler(chat))
    chat.server.daemon_threads = True
    chat.server.handle_error = lambda *_: None  # clients that gave up
    thread = threading.Thread(target=chat.server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield chat
    finally:
        chat.server.shutdown()
        chat.server.server_close()
        thread.join()


def files_with(text, *folders):
    """Files below `folders` in which `text` occurs, in their content or name."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert files, "nothing was written"
    return [path for path in files if text.encode() in path.read_bytes() or text in path.name]
