"""A client of OpenAI-compatible chat endpoints: patient, parallel, and nothing is paid for twice.

Replies are kept on the disk under a hash of the whole question, so that a run that was killed, or is repeated, asks
only what is missing. The key is read from the environment when a question is sent and goes into its header only.
"""

import json
import logging
import os
import random
import threading
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from fusion.cache import canonical_json, write_json
from fusion.config import UserError, raise_problems
from fusion.config.evaluation import EndpointConfig

TRANSIENT = {408, 409, 425, 429}
"""Status codes, besides 5xx, after which the same question may succeed."""
LONGEST_WAIT_S = 60.0
EMPTY_REPEATS = 2
"""How often an empty answer is asked for again before it is believed."""
LOST_IN_A_ROW = 8
"""After so many questions in a row without an answer the endpoint is given up."""
SHOWN_REASON = 200
PROGRESS_STEPS = 10

log = logging.getLogger(__name__)
logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for every question

Message = Mapping[str, str]


@dataclass(frozen=True)
class Question:
    """All that decides an answer."""

    messages: tuple[Message, ...]
    temperature: float = 0.0
    max_tokens: int = 1024
    top_logprobs: int = 0
    """Log-probabilities of so many candidates for every token of the answer; 0: none. A model that refuses such
    questions is asked without them."""
    seed: int | None = None
    sample: int = 0
    """Number of the repetition, where the same question is asked several times."""


@dataclass(frozen=True)
class Reply:
    text: str
    first_token: Mapping[str, float] | None
    """Natural log-probabilities of the candidates for the answer's first token; None where the endpoint has none."""
    model: str
    """As the endpoint names what has answered."""
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Refused(UserError):
    """The endpoint will not answer this question, however often it is asked."""


class _Lost(Exception):
    """An attempt failed in a way that may pass; `wait` is what the endpoint asks for, in seconds."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class _NotAsked(_Lost):
    """There was no attempt, because others have failed."""


@dataclass
class Ledger:
    """What the questions have cost, kept by several threads."""

    asked: int = 0
    """Questions that were sent and answered."""
    from_cache: int = 0
    repeated: int = 0
    """Attempts that failed and were made again."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    models: set[str] = field(default_factory=set)
    """What the endpoint called the models that answered."""
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def book(self, reply: Reply, from_cache: bool) -> None:
        with self._lock:
            self.models.add(reply.model)
            if from_cache:
                self.from_cache += 1
                return
            self.asked += 1
            self.prompt_tokens += reply.prompt_tokens
            self.completion_tokens += reply.completion_tokens

    def book_repetition(self) -> None:
        with self._lock:
            self.repeated += 1

    def to_json(self, settings: EndpointConfig) -> dict[str, Any]:
        dollars = (
            self.prompt_tokens * settings.input_price + self.completion_tokens * settings.output_price
        ) / 1_000_000
        return {
            "asked": self.asked,
            "from_cache": self.from_cache,
            "repeated": self.repeated,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "dollars": round(dollars, 6),
            "models": sorted(self.models),
        }


class Endpoint:
    """Asks questions of one model at one endpoint. `cache` is the folder of replies."""

    def __init__(self, settings: EndpointConfig, cache: Path) -> None:
        """Raises UserError, with every problem, for settings with which nothing can be asked."""
        raise_problems(endpoint_problems(settings, "judge"))
        self.settings = settings
        self.ledger = Ledger()
        self._cache = cache / "replies"
        self._client = httpx.Client(
            timeout=settings.timeout_s, limits=httpx.Limits(max_connections=settings.concurrency)
        )
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._lost_in_a_row = 0
        self._gives_logprobs = True

    def ask(self, question: Question) -> Reply:
        return self.ask_all([question])[0]

    def ask_all(self, questions: Sequence[Question]) -> list[Reply]:
        """Replies in the order of `questions`.

        Raises:
            Refused: the endpoint rejects questions (wrong key, unknown model, wrong parameters).
            UserError: questions stayed without an answer after all retries. What was answered is kept.
        """
        self._stop.clear()
        self._lost_in_a_row = 0
        places = [self._path(question) for question in questions]
        unique = dict(zip(places, questions, strict=True))  # the same question is asked once
        asked = self.ledger.asked  # the first answers may be there before anybody looks
        with ThreadPoolExecutor(max_workers=self.settings.concurrency) as pool:
            futures = {path: pool.submit(self._answer, path, question) for path, question in unique.items()}
            try:
                self._tell_progress(futures.values(), asked)
                errors = [error for future in futures.values() if (error := future.exception()) is not None]
            except BaseException:  # the user's Ctrl-C must not wait for a thousand questions
                self._stop.set()
                raise
        for error in errors:
            if not isinstance(error, _Lost):
                raise error
        if errors:
            first = next((error for error in errors if not isinstance(error, _NotAsked)), errors[0])
            raise UserError(
                f"{self._where}: {len(errors)} of {len(unique)} questions have no answer "
                f"(the first: {first}); run the same command again: answers so far are kept"
            )
        return [futures[path].result() for path in places]

    def _tell_progress(self, futures: Collection[Future[Reply]], asked: int) -> None:
        """Waits for all, and says now and then how far they are; `asked` is how many had been asked before them."""
        step = max(1, len(futures) // PROGRESS_STEPS)
        for done, _ in enumerate(as_completed(futures), start=1):
            if done % step == 0 and self.ledger.asked > asked and len(futures) > PROGRESS_STEPS:
                log.info("%s: %d of %d questions done", self._where, done, len(futures))

    @property
    def _where(self) -> str:
        return f"{self.settings.model} at {self.settings.base_url}"

    def _answer(self, path: Path, question: Question) -> Reply:
        kept = _read_reply(path)
        reply = kept or self._asked_or_lost(question)
        if kept is None and reply.text:  # an empty answer may be a fault of the moment
            write_json(path, {"endpoint": self.settings.base_url, "payload": self._payload(question), **asdict(reply)})
        self.ledger.book(reply, from_cache=kept is not None)
        return reply

    def _path(self, question: Question) -> Path:
        key = {"endpoint": self.settings.base_url, "sample": question.sample, "payload": self._payload(question)}
        name = sha256(canonical_json(key).encode()).hexdigest()
        return self._cache / name[:2] / f"{name}.json"

    def _payload(self, question: Question) -> dict[str, Any]:
        optional = {
            "seed": question.seed,
            "logprobs": True if question.top_logprobs else None,
            "top_logprobs": question.top_logprobs or None,
        }
        return {
            "model": self.settings.model,
            "messages": [dict(message) for message in question.messages],
            "temperature": question.temperature,
            "max_tokens": question.max_tokens,
            **{name: value for name, value in optional.items() if value is not None},
        }

    def _asked_or_lost(self, question: Question) -> Reply:
        """The reply; an endpoint that has lost many questions in a row is asked nothing more."""
        try:
            reply = self._asked_patiently(question)
        except _Lost:
            with self._lock:
                self._lost_in_a_row += 1
                if self._lost_in_a_row >= LOST_IN_A_ROW:
                    self._stop.set()
            raise
        with self._lock:
            self._lost_in_a_row = 0
        return reply

    def _asked_patiently(self, question: Question) -> Reply:
        """The reply, after as many attempts as the settings allow; an empty one is accepted from the last."""
        for attempt in range(self.settings.retries + 1):
            is_last = attempt == self.settings.retries
            try:
                reply = self._asked_once(question)
            except _Lost as lost:
                if is_last or self._stop.is_set():
                    raise
                wait = lost.wait
            except Refused:
                self._stop.set()
                raise
            else:
                if reply.text or is_last or attempt >= EMPTY_REPEATS:
                    return reply
                wait = 0.0
            self.ledger.book_repetition()
            backoff = min(LONGEST_WAIT_S, self.settings.first_wait_s * 2**attempt) * random.uniform(0.5, 1.5)
            self._stop.wait(max(wait, backoff))
        raise AssertionError("the last attempt returns or raises")

    def _asked_once(self, question: Question) -> Reply:
        if self._stop.is_set():
            raise _NotAsked("not asked, because the endpoint refused another question or answered none")
        if not self._gives_logprobs:
            question = replace(question, top_logprobs=0)
        try:
            response = self._client.post(
                f"{self.settings.base_url.rstrip('/')}/chat/completions",
                json=self._payload(question),
                headers=self._headers(),
            )
        except httpx.HTTPError as error:
            raise _Lost(self._without_key(f"{type(error).__name__}: {error}")) from None
        if response.status_code in TRANSIENT or response.status_code >= 500:
            raise _Lost(f"status {response.status_code}", _wait_asked_for(response))
        if response.status_code != 200:
            reason = self._without_key(" ".join(response.text.split()))[:SHOWN_REASON]
            if question.top_logprobs and "logprob" in response.text:
                log.warning("%s gives no log-probabilities (%s); asked without them", self._where, reason)
                self._gives_logprobs = False
                return self._asked_once(question)
            raise Refused(f"{self._where} refuses: status {response.status_code}: {reason}")
        return _parsed(response)

    def _headers(self) -> dict[str, str]:
        key = self._key()
        return {"Authorization": f"Bearer {key}"} if key else {}

    def _key(self) -> str:
        return os.environ.get(self.settings.key_variable, "") if self.settings.key_variable else ""

    def _without_key(self, text: str) -> str:
        """Servers repeat keys in their complaints."""
        key = self._key()
        return text.replace(key, "[key]") if key else text


def endpoint_problems(settings: EndpointConfig, group: str) -> list[str]:
    """Why nothing can be asked with these settings, which are those of `group` (judge, generation)."""
    problems = []
    url = urlsplit(settings.base_url)
    if url.scheme not in ("http", "https") or not url.hostname:
        problems.append(
            f"{group}.base_url={settings.base_url!r}: the address of an endpoint is expected, http://HOST:PORT/v1"
        )
    if url.username or url.password or url.query:
        problems = [
            f"{group}.base_url must hold no key or password (it is recorded); name an environment variable in "
            f"{group}.key_variable"
        ]
    if not settings.model:
        problems.append(f"the endpoint's model is not named; set {group}.model")
    if settings.key_variable and not os.environ.get(settings.key_variable):
        problems.append(
            f"the environment variable {settings.key_variable} is not set; export it with the endpoint's key, or name "
            f"another in {group}.key_variable (empty for endpoints without keys)"
        )
    return problems


def _wait_asked_for(response: httpx.Response) -> float:
    """Seconds of the header Retry-After; 0 where it is missing or a date."""
    try:
        return min(LONGEST_WAIT_S, max(0.0, float(response.headers.get("retry-after", 0))))
    except ValueError:
        return 0.0


def _parsed(response: httpx.Response) -> Reply:
    try:
        body = response.json()
        choice = body["choices"][0]
        usage = body.get("usage") or {}
        return Reply(
            text=str(choice["message"].get("content") or ""),
            first_token=_first_token(choice),
            model=str(body.get("model", "")),
            prompt_tokens=int(usage.get("prompt_tokens") or 0),
            completion_tokens=int(usage.get("completion_tokens") or 0),
        )
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise _Lost(f"the reply is no chat completion ({type(error).__name__})") from None


def _first_token(choice: Mapping[str, Any]) -> dict[str, float] | None:
    content = (choice.get("logprobs") or {}).get("content") or []
    if not content:
        return None
    return {str(one["token"]): float(one["logprob"]) for one in content[0].get("top_logprobs") or []} or None


def _read_reply(path: Path) -> Reply | None:
    """A kept reply; None where there is none that can be read."""
    try:
        kept = json.loads(path.read_text("utf-8"))
        return Reply(**{name: kept[name] for name in Reply.__dataclass_fields__})
    except (OSError, ValueError, KeyError):
        return None
