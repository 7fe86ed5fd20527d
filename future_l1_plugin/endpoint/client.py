"""Prompts to an OpenAI-compatible endpoint, and usable replies back: concurrency, timeouts, retries, a cache on disk.

    client = ChatClient(EndpointSettings(base_url="http://localhost:8000/v1", model="Qwen/Qwen3-8B"))
    colour = await client.ask("What colour is the sky? One word.", str.strip, sample_id="q1")

Whoever asks brings the prompt and the function that reads a reply: the judge of rewards (`rewards.judge`) and the
rollouts of curation do.

No torch; `openai` is imported with the first request.
"""

import asyncio
import dataclasses
import hashlib
import json
import math
import random
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Mapping
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Generic, TypeVar

from future_l1_plugin.endpoint.cache import ReplyCache
from future_l1_plugin.endpoint.errors import EndpointError, MalformedReply, NoReply
from future_l1_plugin.endpoint.settings import MISSING, EndpointSettings, find_key
from future_l1_plugin.errors import ConfigError, shorten

T = TypeVar("T")


class _Retry(Exception):
    """A request failed in a way that may pass. `wait_s` is the server's Retry-After, 0 if it named none."""

    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class _Refused(Exception):
    """A request failed in a way that will not pass, for this sample or for `all_alike`."""

    def __init__(self, reason: str, all_alike: bool) -> None:
        super().__init__(reason)
        self.all_alike = all_alike


class _Turn(asyncio.Lock):
    """Held by the one that asks for a key; `failure` is for those who waited meanwhile."""

    failure: EndpointError | None = None


@dataclasses.dataclass(frozen=True)
class _Request(Generic[T]):
    """What one call of `ask` wants."""

    content: str | list[dict[str, Any]]
    read: Callable[[str], T]
    seed: int | None
    cut_off: bool


@dataclasses.dataclass
class _LoopState:
    """What belongs to one event loop and must not be used in another."""

    client: Any
    lifetime: AsyncGenerator
    slots: asyncio.Semaphore
    turns: weakref.WeakValueDictionary = dataclasses.field(default_factory=weakref.WeakValueDictionary)


class ChatClient:
    """Carries prompts to the endpoint of `settings`, and replies that `read` accepts back.

    May be used from several event loops, one after another or in threads; each has its own connections and its own
    `max_concurrency`. Build one in each process.

    Raises:
        ConfigError: no model, no key where one is needed, a key file that is missing or empty.
        EndpointError: the cache cannot be opened.
    """

    def __init__(self, settings: EndpointSettings) -> None:
        if settings.model in (MISSING, ""):
            raise ConfigError("model must be given: the name under which the endpoint serves it")
        self.settings = settings
        self._key, self._key_source = find_key(settings)
        self._cache = ReplyCache(Path(settings.cache).expanduser()) if settings.cache else None
        self._jitter = random.Random()  # its own: the waits must not move the random numbers of a training run
        self._states: dict[asyncio.AbstractEventLoop, _LoopState] = {}
        self._guard = threading.Lock()

    async def ask(
        self,
        content: str | list[dict[str, Any]],
        read: Callable[[str], T],
        sample_id: str,
        reminder: str = "",
        seed: int | None = None,
        cut_off: bool = False,
    ) -> T:
        """What `read` makes of the reply to one user message, from the cache if it is there.

        Args:
            content: the message, as text or as the list of parts of the OpenAI chat format.
            read: turns a reply into a result or raises MalformedReply, which leads to a retry. Runs again on cached
                replies; one that it no longer accepts is asked for anew.
            sample_id: part of the cache's key, and named in errors.
            reminder: put behind the message in a retry after a malformed reply.
            seed: of the endpoint's sampling, part of the cache's key; None = not sent.
            cut_off: whether a reply that max_tokens cut off may be read; else it is malformed.

        Raises:
            NoReply: no usable reply for this sample.
            EndpointError: a fault that no sample escapes, such as a refused key or a broken cache.
        """
        state, request = await self._state(), _Request(content, read, seed, cut_off)
        if self._cache is None:
            return (await self._fetch(state, request, sample_id, reminder))[1]
        key = self._cache_key(content, sample_id, seed)
        # Equal prompts at the same time are one request, and share its failure. The turn comes before the slot for a
        # request: the other way round, those who wait for their turn would hold the slot that its owner needs.
        turn = state.turns.setdefault(key, _Turn())
        async with turn:
            if turn.failure is not None:
                raise type(turn.failure)(str(turn.failure), sample_id) from turn.failure
            cached = await asyncio.to_thread(self._cache.get, key)
            if cached is not None:
                try:
                    return read(cached)
                except MalformedReply:
                    pass  # an older version's parser took it; its successor decides, so ask again
            try:
                reply, result = await self._fetch(state, request, sample_id, reminder)
            except EndpointError as error:
                turn.failure = error
                raise
            await asyncio.to_thread(self._cache.put, key, self.settings.model, sample_id, reply)
            return result

    async def aclose(self) -> None:
        """Close the running loop's connections. `asyncio.run` also does so at its end."""
        with self._guard:
            state = self._states.pop(asyncio.get_running_loop(), None)
        if state is not None:
            await state.lifetime.aclose()

    def _cache_key(self, content: str | list[dict[str, Any]], sample_id: str, seed: int | None) -> str:
        parts = [self.settings.model, content, sample_id, self.settings.temperature, self.settings.max_tokens]
        parts += [] if seed is None else [seed]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    async def _state(self) -> _LoopState:
        loop = asyncio.get_running_loop()
        with self._guard:
            if (state := self._states.get(loop)) is not None:
                return state
            for other in [other for other in self._states if other.is_closed()]:
                del self._states[other]
        lifetime = _client_lifetime(self.settings.base_url, self._key)
        state = _LoopState(await anext(lifetime), lifetime, asyncio.Semaphore(self.settings.max_concurrency))
        with self._guard:
            return self._states.setdefault(loop, state)

    async def _fetch(self, state: _LoopState, request: _Request[T], sample_id: str, reminder: str) -> tuple[str, T]:
        """(reply, what `request.read` made of it), after as many requests as it takes and the settings allow."""
        retries, added = self.settings.max_retries, ""
        for attempt in range(retries + 1):
            wait_s = 0.0
            try:
                async with state.slots:  # free again during the wait before a retry
                    reply = await self._send(state.client, request, added)
                return reply, request.read(reply)
            except _Refused as error:
                raise self._failure(str(error), sample_id, attempt + 1, error.all_alike) from error
            except MalformedReply as error:
                reason, added = str(error), reminder
            except _Retry as error:
                reason, wait_s = str(error), error.wait_s
            if wait_s > self.settings.max_backoff_s:
                reason += f", to be asked again after {wait_s:g} s. Wait, or raise max_backoff_s"
                raise self._failure(reason, sample_id, attempt + 1)
            if attempt < retries:
                await asyncio.sleep(self._backoff(attempt, wait_s))
        reason += ". Check that the server runs; raise max_retries, timeout_s or max_tokens"
        raise self._failure(reason, sample_id, retries + 1)

    def _backoff(self, attempt: int, wait_s: float) -> float:
        """Seconds before the next request; never less than the server's `wait_s`."""
        longest = min(self.settings.backoff_s * 2 ** min(attempt, 60), self.settings.max_backoff_s)
        if wait_s > longest:  # spread out, lest all that were turned away return at the same moment
            return wait_s + self._jitter.uniform(0, self.settings.backoff_s)
        return max(wait_s, longest * self._jitter.uniform(0.5, 1.0))

    def _failure(self, reason: str, sample_id: str, requests: int, all_alike: bool = False) -> EndpointError:
        return (EndpointError if all_alike else NoReply)(
            f"sample {sample_id}: no usable reply from {self.settings.model} at {self.settings.base_url} after "
            f"{requests} request{'s' if requests > 1 else ''}: {reason}.",
            sample_id,
        )

    async def _send(self, client: Any, request: _Request, added: str) -> str:
        """The text of the reply to one request. Raises _Retry, _Refused or MalformedReply."""
        import openai

        settings = self.settings
        sampling = {"temperature": settings.temperature, "max_tokens": settings.max_tokens, "seed": request.seed}
        try:
            # The client's own timeout restarts with every byte; a server that drips would hold its slot for ever.
            async with asyncio.timeout(settings.timeout_s):
                response = await client.chat.completions.with_raw_response.create(
                    model=settings.model,
                    messages=[{"role": "user", "content": _with_text(request.content, added)}],
                    **{name: value for name, value in sampling.items() if value is not None},
                )
        except TimeoutError as error:
            raise _Retry(f"no whole reply within timeout_s={settings.timeout_s:g}") from error
        except openai.APIStatusError as error:
            raise self._status_error(error) from error
        except openai.APIConnectionError as error:
            raise _Retry(f"the connection failed ({error.__cause__ or error})") from error
        return _reply_text(response.text, request.cut_off)

    def _status_error(self, error: Any) -> _Retry | _Refused:
        """Which failure an HTTP status is, with its remedy."""
        status = error.status_code
        said = f"HTTP {status}, {' '.join(error.message.split())[:400]}"
        paid_up = error.code != "insufficient_quota"  # 429 as well; no credit: retrying is useless
        if status in (408, 409, 425) or (status == 429 and paid_up) or status >= 500:
            return _Retry(said, _retry_after(error.response.headers))
        remedy = {
            400: "The request is refused. If it names temperature or max_tokens, set that to null",
            401: f"The key ({self._key_source}) is missing, wrong or expired. Put a valid one into api_key_file",
            402: "The account has no credit left. Fill it, or use another key",
            403: f"The key ({self._key_source}) may not use this model. Use another key or model",
            404: "No such model or path. Check `model`, and the path of base_url, which often ends in /v1",
            429: "The account has no credit left. Fill it, or use another key",
        }.get(status, "The server refuses the request. Its own words say why")
        # Any other refusal can be the sample's: too long, or stopped by a content filter.
        return _Refused(f"{said}. {remedy}", all_alike=status in (401, 402, 403, 404, 429))


async def _client_lifetime(base_url: str, key: str | None) -> AsyncGenerator:
    """Yields an openai client and closes it at the end, for which `asyncio.run` sees to: it ends the generators that
    were begun in its loop. So no connection outlives its loop, and a host need not call `aclose`."""
    from openai import AsyncOpenAI

    # No timeout and no retries there: both are this module's.
    client = AsyncOpenAI(base_url=base_url, api_key=key, timeout=None, max_retries=0)
    try:
        yield client
    finally:
        await client.close()


def _with_text(content: str | list[dict[str, Any]], text: str) -> str | list[dict[str, Any]]:
    if not text or isinstance(content, str):
        return content + text if text else content
    return [*content, {"type": "text", "text": text.strip()}]


def _reply_text(body: str, cut_off: bool) -> str:
    """The message in a chat completion. Read here, not by the client, which lets bodies of any shape through."""
    try:
        choice = json.loads(body)["choices"][0]
        text = choice["message"]["content"]
    except (ValueError, RecursionError, KeyError, IndexError, TypeError) as error:
        raise MalformedReply(f"expected a chat completion, found {shorten(body)}") from error
    if choice.get("finish_reason") == "length" and not cut_off:  # the rest may have taken back what was said
        raise MalformedReply(f"the reply was cut off by max_tokens: {shorten(text)}")
    if not isinstance(text, str) or not text.strip():
        raise MalformedReply("expected text, found an empty message")
    return text.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair cannot be stored


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that the server asks to wait, 0 if it asks for none or says so unreadably. A number or an HTTP date."""
    value = headers.get("retry-after")
    if value is None:
        return 0.0
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return max(0.0, seconds) if not math.isnan(seconds) else 0.0
