"""Talks to an OpenAI-compatible endpoint: many chats at a time, each tried again while the endpoint is busy."""

import asyncio
import json
import os
import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ablate_shards.errors import EvaluateError, UsageError, reason

if TYPE_CHECKING:
    import httpx2

__all__ = ["ChatOptions", "Endpoint", "Messages", "Reply", "chat", "open_endpoint"]

Messages = Sequence[Mapping[str, str]]

_FIRST_PAUSE = 1.0
_LONGEST_PAUSE = 60.0
#: A request that ran out of time is made once more only, since that took long already.
_MOST_TIMEOUTS = 2
_MOST_BYTES = 16 << 20
_SHOWN = 160
_BUSY = frozenset({408, 425, 429, 500, 502, 503, 504, 529})
_REFUSED = frozenset({400, 422})
_KEY = re.compile(r"[!-~]+")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where to ask, how long to wait for an answer, and how often to try.

    Attributes:
        url: The base, such as ``http://localhost:8000/v1``; holds no secret.
        model: The name that the endpoint knows the model by.
        key: What it wants to see as a bearer token, None for nothing; not in ``repr``.
        timeout: Seconds that one answer may take.
        attempts: How often a request is made before the endpoint counts as broken.
    """

    url: str
    model: str
    key: str | None = field(repr=False)
    timeout: float
    attempts: int


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """How to ask.

    Attributes:
        tokens: Most tokens of an answer.
        thinking: Whether the chat template is asked to let the model think first.
        at_once: Requests under way at a time.
        greedy: Whether an endpoint that refuses temperature 0 is an error.
    """

    tokens: int = 256
    thinking: bool = False
    at_once: int = 16
    greedy: bool = True


@dataclass(frozen=True, slots=True)
class Reply:
    """What a model said.

    Attributes:
        text: All that it said, thoughts in ``<think>`` tags included.
        ended: Whether it came to its own end, and was not cut off.
    """

    text: str
    ended: bool


def open_endpoint(
    url: str, model: str | None, *, key_variable: str, option: str, timeout: float, attempts: int = 5
) -> Endpoint:
    """Checks an endpoint's address and finds the name of its model.

    Args:
        url: Its base; without a path ``/v1`` is meant.
        model: The name of the model, asked of the endpoint if None.
        key_variable: The environment variable that holds the key, if one is needed.
        option: What the user would name the model with, for messages.
        timeout: Seconds that one answer may take.
        attempts: How often a request is made before the endpoint counts as broken.

    Raises:
        UsageError: The address cannot be used, or carries credentials, or the key is none.
        EvaluateError: httpx2 is not installed, or the endpoint does not answer, or serves no or several models.
    """
    base = _base(url)
    key = os.environ.get(key_variable, "").strip()
    if key and not _KEY.fullmatch(key):
        raise UsageError(f"{key_variable}: expected a key of printable ASCII without spaces; set it anew")
    endpoint = Endpoint(base, model or "", key or None, timeout, attempts)
    return endpoint if model is not None else replace(endpoint, model=asyncio.run(_only_model(endpoint, option)))


def chat(
    endpoint: Endpoint,
    conversations: Sequence[Messages],
    options: ChatOptions,
    answered: Callable[[int, Reply], None],
    note: Callable[[str], None],
) -> None:
    """Has all ``conversations`` answered, several at a time.

    Args:
        endpoint: Where.
        conversations: What was said so far in each.
        options: How to ask.
        answered: Receives the number of a conversation and the reply, in the order in which replies come.
        note: Receives one line on what the endpoint does not support.

    Raises:
        EvaluateError: The endpoint does not answer in time, is unreachable, refuses, or answers garbage, after
            several attempts where another may help. Earlier replies have been passed on.
    """
    asyncio.run(_Chat(endpoint, options, note).run(conversations, answered))


class _Chat:
    """One run of many chats with an endpoint."""

    def __init__(self, endpoint: Endpoint, options: ChatOptions, note: Callable[[str], None]) -> None:
        self._endpoint = endpoint
        self._note = note
        limits = {"temperature": 0, "max_tokens": options.tokens}
        template = {"seed": 0, "chat_template_kwargs": {"enable_thinking": options.thinking}}
        #: What to ask for beside the answer, with what is lost with it; an endpoint that refuses one gets the next.
        self._forms: list[tuple[str, Mapping[str, Any]]] = [
            ("", {**limits, **template}),
            ("it takes no chat template options, so the model may think first", limits),
        ]
        if not options.greedy:
            self._forms.append(("it takes no temperature", {"max_completion_tokens": options.tokens}))
        self._turns = asyncio.Semaphore(options.at_once)

    async def run(self, conversations: Sequence[Messages], answered: Callable[[int, Reply], None]) -> None:
        async with _client(self._endpoint) as client:
            tasks = [
                asyncio.create_task(self._numbered(client, number, messages))
                for number, messages in enumerate(conversations)
            ]
            try:
                for task in asyncio.as_completed(tasks):
                    answered(*await task)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _numbered(self, client: "httpx2.AsyncClient", number: int, messages: Messages) -> tuple[int, Reply]:
        async with self._turns:
            return number, await self._reply(client, messages)

    async def _reply(self, client: "httpx2.AsyncClient", messages: Messages) -> Reply:
        while True:
            form = self._forms[0]
            body = {"model": self._endpoint.model, "messages": list(messages), **form[1]}
            try:
                return _read_reply(self._endpoint, await _request(client, self._endpoint, "/chat/completions", body))
            except _Refused as refused:
                # Another chat may have found out already.
                if self._forms[0] is not form:
                    continue
                if len(self._forms) == 1:
                    raise EvaluateError(str(refused)) from refused
                self._forms.pop(0)
                self._note(f"{self._endpoint.url}: {self._forms[0][0]}")


class _Refused(Exception):  # noqa: N818 - no error yet
    """The endpoint does not take a request in this form."""


@asynccontextmanager
async def _client(endpoint: Endpoint) -> AsyncIterator["httpx2.AsyncClient"]:
    import httpx2

    headers = {"Authorization": f"Bearer {endpoint.key}"} if endpoint.key else {}
    # The time is kept for a request as a whole: an endpoint that sends a byte now and then hangs as well.
    async with httpx2.AsyncClient(
        headers=headers, timeout=None, limits=httpx2.Limits(max_connections=None), follow_redirects=False
    ) as client:
        yield client


async def _only_model(endpoint: Endpoint, option: str) -> str:
    async with _client(endpoint) as client:
        try:
            content = await _request(client, endpoint, "/models", None)
        except _Refused as refused:
            raise EvaluateError(str(refused)) from refused
    found = content.get("data")
    entries = found if isinstance(found, list) else []
    names = [str(entry["id"]) for entry in entries if isinstance(entry, dict) and isinstance(entry.get("id"), str)]
    if len(names) != 1:
        listed = ", ".join(names[:8]) or "none"
        raise EvaluateError(f"{endpoint.url}: expected one model, found {listed}; name one with {option}")
    return names[0]


async def _request(
    client: "httpx2.AsyncClient", endpoint: Endpoint, path: str, body: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Makes a request until it is answered, waiting ever longer, and returns the JSON object.

    Raises:
        EvaluateError: It is not.
        _Refused: The endpoint says that the request is malformed.
    """
    import httpx2

    url, timeouts = endpoint.url + path, 0
    problem = ""
    for attempt in range(endpoint.attempts):
        pause = min(_FIRST_PAUSE * 2**attempt, _LONGEST_PAUSE)
        try:
            async with asyncio.timeout(endpoint.timeout):
                status, headers, raw = await _fetch(client, url, body)
        except TimeoutError:
            timeouts += 1
            problem = f"no answer within {endpoint.timeout:g} s"
            if timeouts == _MOST_TIMEOUTS:
                break
        except httpx2.TransportError as error:
            problem = f"cannot be reached ({_redacted(endpoint, reason(error))})"
        except httpx2.DecodingError as error:
            raise EvaluateError(f"{endpoint.url}: expected JSON, found broken compression; is it the API?") from error
        else:
            said = _redacted(endpoint, _excerpt(raw))
            if status == 200:
                return _read_object(endpoint, raw, said)
            problem = f"answered {status}: {said}" if said else f"answered {status}"
            if status in _REFUSED:
                raise _Refused(f"{endpoint.url}: {problem}")
            if status not in _BUSY:
                raise EvaluateError(f"{endpoint.url}: {problem}{_advice(status)}")
            pause = min(max(pause, _retry_after(headers)), _LONGEST_PAUSE)
        if attempt + 1 < endpoint.attempts:
            await asyncio.sleep(pause)
    raise EvaluateError(f"{endpoint.url}: {problem}; see to the endpoint, or allow it more time")


async def _fetch(
    client: "httpx2.AsyncClient", url: str, body: Mapping[str, Any] | None
) -> tuple[int, Mapping[str, str], bytes]:
    raw = bytearray()
    async with client.stream("GET" if body is None else "POST", url, json=body) as response:
        async for chunk in response.aiter_bytes():
            raw += chunk
            if len(raw) > _MOST_BYTES:
                break
        return response.status_code, response.headers, bytes(raw)


def _read_object(endpoint: Endpoint, raw: bytes, said: str) -> dict[str, Any]:
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise EvaluateError(f"{endpoint.url}: expected JSON, found {said or 'nothing'!r}; is it the API?") from error
    if not isinstance(content, dict):
        raise EvaluateError(f"{endpoint.url}: expected a JSON object, found {said!r}; is it the API?")
    return content


def _read_reply(endpoint: Endpoint, content: Mapping[str, Any]) -> Reply:
    try:
        choice = content["choices"][0]
        message = choice["message"]
        said = message.get("content") or message.get("refusal") or ""
        thought = message.get("reasoning_content") or message.get("reasoning") or ""
    except (LookupError, TypeError, AttributeError) as error:
        said = _redacted(endpoint, _excerpt(json.dumps(content, ensure_ascii=False).encode(errors="replace")))
        raise EvaluateError(f"{endpoint.url}: expected a chat completion, found {said!r}") from error
    if not isinstance(said, str) or not isinstance(thought, str):
        raise EvaluateError(f"{endpoint.url}: expected the message as text, found {type(said).__name__}")
    text = f"<think>{thought}</think>{said}" if thought else said
    # JSON can spell half a character, which no file takes.
    return Reply(text.encode(errors="replace").decode(), choice.get("finish_reason") in (None, "stop"))


def _base(url: str) -> str:
    try:
        import httpx2
    except ImportError as error:
        raise EvaluateError(
            f"endpoints are asked with {error.name}, which is not installed; `pip install 'ablate-shards[lora]'`"
        ) from error
    try:
        parts = httpx2.URL(url)
    except (httpx2.InvalidURL, TypeError, ValueError) as error:
        raise UsageError("the endpoint's address is no URL; write it as http://localhost:8000/v1") from error
    if parts.userinfo or parts.query or parts.fragment:
        raise UsageError(
            "the endpoint's address carries a user name, a query or a fragment; write it without, such as "
            "http://localhost:8000/v1, and give the key in the environment"
        )
    if parts.scheme not in ("http", "https") or not parts.host:
        raise UsageError(f"{url}: expected a URL such as http://localhost:8000/v1")
    path = parts.path.rstrip("/").removesuffix("/chat/completions")
    return f"{parts.scheme}://{parts.netloc.decode()}{path or '/v1'}"


def _retry_after(headers: Mapping[str, str]) -> float:
    asked = headers.get("retry-after", "")
    return float(asked) if re.fullmatch(r"\d{1,6}(\.\d{1,6})?", asked) else 0.0


def _advice(status: int) -> str:
    if status in (401, 403):
        return "; give a key in the environment"
    if status == 404:
        return "; check the address, which mostly ends in /v1, and the name of the model"
    return ""


def _excerpt(raw: bytes) -> str:
    try:
        content = json.loads(raw)
        error = content["error"]
        text = error["message"] if isinstance(error, dict) else error
    except (ValueError, LookupError, TypeError, RecursionError):
        text = raw[: 4 * _SHOWN].decode(errors="replace")
    text = " ".join(str(text).split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _redacted(endpoint: Endpoint, text: str) -> str:
    return text.replace(endpoint.key, "***") if endpoint.key else text
