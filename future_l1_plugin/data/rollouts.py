"""Answers of a model to many prompts, for curation: by transformers in this process, or by a served model. A third
engine, vLLM, is in `integrations/vllm/engine.py`.

An engine takes jobs and hands each answer to `store` as it comes. The answer to a job is a function of the job and of
the settings, not of what was answered before: a broken-off run that goes on gives what an unbroken one gives.
"""

import asyncio
import base64
import hashlib
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from future_l1_plugin.data.frames import read_frames
from future_l1_plugin.data.prompt import RlPrompt, chat_messages, encode_prompt
from future_l1_plugin.endpoint.client import ChatClient
from future_l1_plugin.endpoint.errors import EndpointError, NoReply
from future_l1_plugin.endpoint.settings import EndpointSettings
from future_l1_plugin.errors import CheckpointError, ConfigError

#: Failures in a row, without a reply in between, at which an endpoint counts as gone.
GIVE_UP_AFTER = 20


@dataclass(frozen=True)
class Job:
    """One answer that is wanted: the `sample`-th to a prompt. `key`: identifies it, over runs and machines."""

    key: str
    prompt: RlPrompt
    sample: int


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. temperature > 0; `max_new_tokens` is the longest answer; one seed, one set of answers."""

    temperature: float = 1.0
    max_new_tokens: int = 512
    seed: int = 0


Store = Callable[[list[tuple[Job, str]]], None]


class Engine(Protocol):
    """Where answers come from."""

    def identity(self) -> list[Any]:
        """JSON values that tell this model from others, the same on every machine."""

    def run(self, jobs: Sequence[Job], done: Callable[[Job], bool], store: Store) -> list[str]:
        """Answer every job that is not `done`; returns why others got no answer."""


def seed_of(*parts: Any) -> int:
    """A seed below 2**31, the same in every process, unlike `hash`."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4]) >> 1


# ---- transformers ---------------------------------------------------------------------------------------------------


class HfEngine:
    """Batches through transformers' `generate`; latent checkpoints decode their spans.

    A batch is always the same `batch_size` jobs with randomness of its own. One that a killed run left half stored is
    decoded again in whole.

    Args:
        model: checkpoint folder or hub id, latent or not.
        device: None: cuda if there is one.

    Raises:
        CheckpointError, at the first batch: no checkpoint there.
    """

    def __init__(
        self, model: str, sampling: Sampling, batch_size: int = 64, device: str | None = None, dtype: str = "auto"
    ) -> None:
        self._path, self._sampling, self._batch_size = model, sampling, batch_size
        self._device_name, self._dtype = device, dtype
        self._loaded: tuple[Any, Any, bool] | None = None

    def identity(self) -> list[Any]:
        return ["hf", *fingerprint(self._path), self._dtype]

    def run(self, jobs: Sequence[Job], done: Callable[[Job], bool], store: Store) -> list[str]:
        for start in range(0, len(jobs), self._batch_size):
            batch = jobs[start : start + self._batch_size]
            if not all(map(done, batch)):
                answers = self._decode(batch)
                store([pair for pair in zip(batch, answers, strict=True) if not done(pair[0])])
        return []

    def _decode(self, batch: Sequence[Job]) -> list[str]:
        import torch

        from future_l1_plugin.model import generate
        from future_l1_plugin.model.batch import left_padded

        model, processor, latent = self._load()
        encoded: dict[str, dict[str, Any]] = {}
        for job in batch:
            # Two prompts of one id differ in the frames that they show.
            name = f"{job.prompt.id} {job.prompt.pool}"
            if name not in encoded:
                encoded[name] = encode_prompt(job.prompt, processor).inputs
        rows = [encoded[f"{job.prompt.id} {job.prompt.pool}"] for job in batch]
        inputs = left_padded(rows, processor.tokenizer.pad_token_id, model.device)
        seed = seed_of(self._sampling.seed, *(job.key for job in batch))
        with torch.no_grad():
            if latent:
                return generate(
                    model,
                    inputs,
                    max_new_tokens=self._sampling.max_new_tokens,
                    temperature=self._sampling.temperature,
                    generator=torch.Generator(model.device).manual_seed(seed),
                ).text
            devices = [] if model.device.type == "cpu" else [model.device]
            with torch.random.fork_rng(devices):
                torch.manual_seed(seed)
                # Checkpoints bring sampling defaults of their own; what is asked for here must not mix with them.
                ids = model.generate(
                    **inputs,
                    max_new_tokens=self._sampling.max_new_tokens,
                    do_sample=True,
                    temperature=self._sampling.temperature,
                    top_p=1.0,
                    top_k=0,
                    repetition_penalty=1.0,
                )
        return processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def _load(self) -> tuple[Any, Any, bool]:
        if self._loaded is None:
            import torch
            from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

            from future_l1_plugin.model import load

            torch.set_flush_denormal(True)  # a small model is full of such numbers, on which a CPU is slow
            device = self._device_name or ("cuda" if torch.cuda.is_available() else "cpu")
            try:
                latent = getattr(AutoConfig.from_pretrained(self._path), "latent_id", None) is not None
                if latent:
                    model, processor = load(self._path, device, self._dtype)
                else:
                    model = AutoModelForImageTextToText.from_pretrained(self._path, dtype=self._dtype)
                    model, processor = model.to(device).eval(), AutoProcessor.from_pretrained(self._path)
            except OSError as error:
                found = f"hf.model={self._path}: expected a checkpoint folder or a hub id: {error}"
                raise CheckpointError(found) from error
            self._loaded = model, processor, latent
        return self._loaded


def fingerprint(path: str) -> list[Any]:
    """A checkpoint by content, so that copies on several machines are one: sizes, configuration, ends of the weights.

    Not every byte: that would take minutes for a large model. A hub id stands for itself.
    """
    folder = Path(path)
    if not folder.is_dir():
        return [path]
    marks = []
    for file in sorted(folder.iterdir()):
        if file.suffix in (".safetensors", ".bin", ".json", ".jinja", ".txt"):
            size = file.stat().st_size
            with open(file, "rb") as stream:
                digest = hashlib.sha256(stream.read(1 << 20))
                stream.seek(max(0, size - (1 << 20)))
                digest.update(stream.read())
            marks.append([file.name, size, digest.hexdigest()[:16]])
    return marks


# ---- a served model -------------------------------------------------------------------------------------------------


@dataclass
class EndpointEngine:
    """Requests to an OpenAI-compatible endpoint, `max_concurrency` at a time; frames travel as PNG.

    Raises:
        ConfigError: see ChatClient; prompts that show a video.
    """

    settings: EndpointSettings
    sampling: Sampling
    _client: ChatClient = field(init=False)

    def __post_init__(self) -> None:
        self._client = ChatClient(self.settings)

    def identity(self) -> list[Any]:
        return ["endpoint", self.settings.model]

    def run(self, jobs: Sequence[Job], done: Callable[[Job], bool], store: Store) -> list[str]:
        if any(job.prompt.media == "video" for job in jobs):
            raise ConfigError(
                "data.question_media: expected images for an endpoint, whose chat takes no frames of a video, found "
                "video. Set it to images, or rollouts.engine to hf or vllm"
            )
        return asyncio.run(self._run((job for job in jobs if not done(job)), store))

    async def _run(self, jobs: Iterable[Job], store: Store) -> list[str]:
        failed: list[str] = []
        in_a_row = 0
        contents: dict[str, asyncio.Future] = {}  # of the prompts under way: one's jobs stand side by side
        ready: list[tuple[Job, str]] = []
        writing = asyncio.Lock()

        async def one(job: Job) -> None:
            nonlocal in_a_row
            name = f"{job.prompt.id} {job.prompt.pool}"
            if name not in contents:
                contents[name] = asyncio.ensure_future(asyncio.to_thread(content_of, job.prompt))
                if len(contents) > 2 * at_once:
                    del contents[next(iter(contents))]
            content = await contents[name]
            seed = seed_of(self.sampling.seed, job.sample)
            try:
                answer = await self._client.ask(content, str, job.prompt.id, seed=seed, cut_off=True)
            except NoReply as error:
                failed.append(str(error))
                in_a_row += 1
                if in_a_row >= GIVE_UP_AFTER:
                    raise EndpointError(f"{in_a_row} requests in a row got no reply; the last: {error}") from error
            else:
                in_a_row = 0
                ready.append((job, answer))
                async with writing:  # what comes while the disk is busy is written together
                    if answers := ready[:]:
                        ready.clear()
                        await asyncio.to_thread(store, answers)

        at_once = 2 * self.settings.max_concurrency
        await each(jobs, one, at_once)
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
        images = iter(read_frames(prompt.video, pool=list(prompt.pool)).frames)
    content = chat_messages(prompt)[0]["content"]
    return [
        {"type": "image_url", "image_url": {"url": _data_url(next(images))}} if part["type"] == "image" else part
        for part in content
    ]


def _data_url(frame: Any) -> str:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
