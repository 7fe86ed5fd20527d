"""Answers of a model to many prompts, for curation: of a checkpoint on this machine, or of a served model.

An answerer takes attempts and hands each answer to `store` as it comes. The answer to an attempt is a function of the
attempt and of the settings, not of what was answered before: a broken-off run that goes on gives what an unbroken one
gives.
"""

import asyncio
import base64
import hashlib
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any, Protocol

from PIL import Image

from future_l1_plugin.data.frames import read_frames
from future_l1_plugin.data.prompt import RlPrompt, chat_messages, encode_prompt
from future_l1_plugin.endpoint.client import ChatClient
from future_l1_plugin.endpoint.errors import EndpointError, NoReply
from future_l1_plugin.endpoint.settings import EndpointSettings
from future_l1_plugin.errors import ConfigError
from future_l1_plugin.journal import fingerprint
from future_l1_plugin.model.engine import Decoding, Engine, Request, named

#: Failures in a row, without a reply in between, at which an endpoint counts as gone.
GIVE_UP_AFTER = 20


@dataclass(frozen=True)
class Attempt:
    """One answer that is wanted: the `sample`-th to a prompt. `key`: identifies it, over runs and machines."""

    key: str
    prompt: RlPrompt
    sample: int

    @property
    def name(self) -> str:
        """Of the prompt: two of one id differ in the frames that they show."""
        return f"{self.prompt.id} {self.prompt.frames.numbers}"


Store = Callable[[list[tuple[Attempt, str]]], None]


class Answerer(Protocol):
    """Where answers come from."""

    def identity(self) -> list[Any]:
        """JSON values that tell this model from others, the same on every machine."""

    def run(self, attempts: Sequence[Attempt], done: Callable[[Attempt], bool], store: Store) -> list[str]:
        """Answer every attempt that is not `done`; returns why others got no answer."""


def stable_hash(*parts: Any) -> int:
    """A number below 2**31, for seeds and shares; the same in every process, unlike `hash`."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4]) >> 1


# ---- a checkpoint on this machine -----------------------------------------------------------------------------------


class LocalAnswerer:
    """Answers of an engine. Its weights are loaded for the first answer that is missing, and freed at the end of a run.

    Args:
        engine: of the checkpoint `model` in `dtype`, which identify it.
        seed: one seed, one set of answers.
        batch_size: attempts that are decoded together and share their randomness. Such a batch is always the same: one
            that a killed run left half stored is decoded again in whole. None: the engine makes batches as it likes,
            and each attempt has randomness of its own.

    Raises:
        At the first answer: see the engine, `encode_prompt`.
    """

    def __init__(
        self, engine: Engine, model: str, dtype: str, decoding: Decoding, seed: int, batch_size: int | None = None
    ) -> None:
        self._engine, self._checkpoint = engine, (model, dtype)
        self._decoding, self._seed, self._batch_size = decoding, seed, batch_size

    def identity(self) -> list[Any]:
        model, dtype = self._checkpoint
        name, *more = self._engine.describe().values()
        return [name, *fingerprint(model), dtype, *more]

    def run(self, attempts: Sequence[Attempt], done: Callable[[Attempt], bool], store: Store) -> list[str]:
        if all(map(done, attempts)):
            return []
        try:
            requests = partial(self._requests, self._engine.processor)
            for answers in self._engine.answers(self._batches(attempts, done), requests):
                store([(attempt, answer.text) for attempt, answer in answers if not done(attempt)])
        finally:
            self._engine.close()
        return []

    def _batches(self, attempts: Sequence[Attempt], done: Callable[[Attempt], bool]) -> Iterator[list[Attempt]]:
        if self._batch_size is None:  # those to one prompt stand side by side, and it is encoded once
            missing = [attempt for attempt in attempts if not done(attempt)]
            yield from (list(group) for _, group in groupby(missing, key=lambda attempt: attempt.prompt))
            return
        for start in range(0, len(attempts), self._batch_size):
            batch = list(attempts[start : start + self._batch_size])
            if not all(map(done, batch)):
                yield batch

    def _requests(self, processor: Any, batch: Sequence[Attempt]) -> list[Request]:
        """Engines call it in threads."""
        encoded = {}
        for attempt in batch:
            if attempt.name not in encoded:
                with named(attempt.name):
                    encoded[attempt.name] = encode_prompt(attempt.prompt, processor).inputs
        shared = None if self._batch_size is None else stable_hash(self._seed, *(attempt.key for attempt in batch))
        return [
            Request(
                attempt,
                encoded[attempt.name],
                self._decoding,
                stable_hash(self._seed, attempt.key) if shared is None else shared,
                attempt.name,
            )
            for attempt in batch
        ]


# ---- a served model -------------------------------------------------------------------------------------------------


@dataclass
class EndpointAnswerer:
    """Requests to an OpenAI-compatible endpoint, `max_concurrency` at a time; frames travel as PNG.

    Raises:
        ConfigError: see ChatClient; prompts that show a video.
    """

    settings: EndpointSettings
    seed: int
    _client: ChatClient = field(init=False)

    def __post_init__(self) -> None:
        self._client = ChatClient(self.settings)

    def identity(self) -> list[Any]:
        return ["endpoint", self.settings.model]

    def run(self, attempts: Sequence[Attempt], done: Callable[[Attempt], bool], store: Store) -> list[str]:
        if any(attempt.prompt.media == "video" for attempt in attempts):
            raise ConfigError(
                "data.question_media: expected images for an endpoint, whose chat takes no frames of a video, found "
                "video. Set it to images, or rollouts.engine to hf or vllm"
            )
        return asyncio.run(self._run((attempt for attempt in attempts if not done(attempt)), store))

    async def _run(self, attempts: Iterable[Attempt], store: Store) -> list[str]:
        failed: list[str] = []
        in_a_row = 0
        contents: dict[str, asyncio.Future] = {}  # of the prompts under way: one's attempts stand side by side
        ready: list[tuple[Attempt, str]] = []
        writing = asyncio.Lock()

        async def one(attempt: Attempt) -> None:
            nonlocal in_a_row
            name = attempt.name
            if name not in contents:
                contents[name] = asyncio.ensure_future(asyncio.to_thread(content_of, attempt.prompt))
                if len(contents) > 2 * at_once:
                    del contents[next(iter(contents))]
            content = await contents[name]
            seed = stable_hash(self.seed, attempt.sample)
            try:
                answer = await self._client.ask(content, str, attempt.prompt.id, seed=seed, cut_off=True)
            except NoReply as error:
                failed.append(str(error))
                in_a_row += 1
                if in_a_row >= GIVE_UP_AFTER:
                    raise EndpointError(f"{in_a_row} requests in a row got no reply; the last: {error}") from error
            else:
                in_a_row = 0
                ready.append((attempt, answer))
                async with writing:  # what comes while the disk is busy is written together
                    if answers := ready[:]:
                        ready.clear()
                        await asyncio.to_thread(store, answers)

        at_once = 2 * self.settings.max_concurrency
        await each(attempts, one, at_once)
        return failed


async def each(items: Iterable[Any], work: Callable[[Any], Any], at_once: int) -> None:
    """`work` on every item, so many at once. The first error cancels the rest and is raised."""
    source: Iterator[Any] = iter(items)

    async def worker() -> None:
        for item in source:
            await work(item)

    tasks = [asyncio.ensure_future(worker()) for _ in range(at_once)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def content_of(prompt: RlPrompt) -> list[dict[str, Any]]:
    """The user message in OpenAI's chat format: the parts of `chat_messages`, each image as a PNG data URL."""
    images: Iterator[Any] = iter(())
    if prompt.media == "images":
        images = iter(read_frames(prompt.video, frames=prompt.frames).frames)
    content = chat_messages(prompt)[0]["content"]
    return [
        {"type": "image_url", "image_url": {"url": _data_url(next(images))}} if part["type"] == "image" else part
        for part in content
    ]


def _data_url(frame: Any) -> str:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
