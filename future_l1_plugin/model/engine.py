"""One way to ask a checkpoint: what is asked (`Request`), what comes back (`Answer`), and who answers (`Engine`).

Curation, lmms-eval, chat and the probe ask like this. Here is the engine that runs transformers in this process; the
one that runs vLLM is `integrations/vllm/engine.py`.

    engine = TransformersEngine(partial(load, "outputs/latent-8b"))
    for answers in engine.answers(batches, requests):       # requests: makes Requests of a batch
        for key, answer in answers: ..
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from future_l1_plugin.errors import CheckpointError
from future_l1_plugin.model.batch import left_padded
from future_l1_plugin.model.checkpoint import load
from future_l1_plugin.model.decode import generate

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen. max_new_tokens: the longest answer; temperature 0: greedy; top_k 0: of all tokens."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0


@dataclass(frozen=True, eq=False)
class Request:
    """One answer that is wanted.

    Attributes:
        key: handed back with the answer.
        inputs: what the processor returned for this prompt alone, batch dimension 1 (`data.showing.encode`).
        seed: of its tokens and latents, below 2**63.
        name: of the prompt, for messages.
    """

    key: Any
    inputs: Mapping[str, Tensor]
    decoding: Decoding
    seed: int = 0
    name: str = ""

    @property
    def prompt_ids(self) -> list[int]:
        return self.inputs["input_ids"][0].tolist()


@dataclass(frozen=True, eq=False)
class Answer:
    """What a checkpoint said.

    Attributes:
        text: without the end-of-sequence token; a latent checkpoint's with its other special tokens, as `LatentOutput`.
        ids: the response, its end-of-sequence token included.
        prompt_tokens, latent_tokens: how many.
        seconds: the answer's share of the time, see the engine.
        latents: (latent_tokens, H) in the dtype and on the device of the model, what was fed; None: the checkpoint has
            none, or the engine does not bring them back.
    """

    text: str
    ids: list[int]
    prompt_tokens: int
    latent_tokens: int = 0
    seconds: float = 0.0
    latents: Tensor | None = None


class Engine(Protocol):
    """A checkpoint that answers. Weights are loaded at the first answer."""

    @property
    def processor(self) -> Any:
        """The checkpoint's, for `requests` to encode with."""

    def answers(
        self, batches: Iterable[Batch], requests: Callable[[Batch], Iterable[Request]]
    ) -> Iterator[list[tuple[Any, Answer]]]:
        """(key, answer) of everything that is asked, as it is finished.

        Args:
            batches: what is encoded together.
            requests: makes any number of Requests of a batch. An engine may call it in threads, ahead of its use.
        """

    def describe(self) -> dict[str, Any]:
        """What answers depend on beside checkpoint, prompts and decoding, as JSON; `name` first."""

    def close(self) -> None:
        """Free the weights; the next answer loads them again."""


@contextmanager
def named(name: str) -> Iterator[None]:
    """What is raised inside says which prompt it was about; in our own errors the message says so already."""
    try:
        yield
    except Exception as error:
        error.add_note(f"while the prompt {name} was encoded")
        raise


class TransformersEngine:
    """transformers in this process, see `Engine`: a batch at a time, of checkpoints with and without latents.

    Requests of a batch are decoded together, so they share `decoding` and `seed`, and who is in a batch has a say in
    what is drawn. `Answer.seconds` is a share of the time in `generate`.

    Args:
        load: makes (model in eval mode, its processor).
        more: requests of a batch -> further arguments of `generate`, such as a policy. Latent checkpoints only.
    """

    def __init__(
        self,
        load: Callable[[], tuple[Any, Any]],
        more: Callable[[Sequence[Request]], Mapping[str, Any]] | None = None,
    ) -> None:
        self._load, self._more = load, more or (lambda requests: {})

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        torch.set_flush_denormal(True)  # a small model is full of such numbers, on which a CPU is slow
        return self._load()

    @property
    def model(self) -> Any:
        return self._loaded[0]

    @property
    def processor(self) -> Any:
        return self._loaded[1]

    def answers(
        self, batches: Iterable[Batch], requests: Callable[[Batch], Iterable[Request]]
    ) -> Iterator[list[tuple[Any, Answer]]]:
        for batch in batches:
            if asked := list(requests(batch)):
                yield list(zip((request.key for request in asked), self._decode(asked), strict=True))

    def describe(self) -> dict[str, Any]:
        return {"name": "hf"}

    def close(self) -> None:
        self.__dict__.pop("_loaded", None)

    @torch.inference_mode()
    def _decode(self, requests: Sequence[Request]) -> list[Answer]:
        settings = {(request.decoding, request.seed) for request in requests}
        if len(settings) > 1:
            raise ValueError(f"requests of a batch: expected one decoding and seed, found {settings}")
        ((decoding, seed),) = settings
        latent = getattr(self.model.config, "latent_id", None) is not None
        began = time.perf_counter()
        inputs = left_padded(
            [request.inputs for request in requests], self.processor.tokenizer.pad_token_id, self.model.device
        )
        found = (self._with_latents if latent else self._without)(requests, inputs, decoding, seed)
        seconds = (time.perf_counter() - began) / len(requests)
        return [
            Answer(
                text,
                ids,
                prompt_tokens=request.inputs["input_ids"].shape[1],
                latent_tokens=0 if latents is None else len(latents),
                seconds=seconds,
                latents=latents,
            )
            for request, (text, ids, latents) in zip(requests, found, strict=True)
        ]

    def _with_latents(
        self, requests: Sequence[Request], inputs: dict[str, Tensor], decoding: Decoding, seed: int
    ) -> list[tuple[str, list[int], Tensor]]:
        generator = torch.Generator(self.model.device).manual_seed(seed)
        output = generate(self.model, inputs, generator=generator, **asdict(decoding), **self._more(requests))
        responses = [ids.tolist() for ids in output.responses]
        return list(zip(output.text, responses, output.latents, strict=True))

    def _without(
        self, requests: Sequence[Request], inputs: dict[str, Tensor], decoding: Decoding, seed: int
    ) -> list[tuple[str, list[int], None]]:
        model, greedy = self.model, decoding.temperature == 0
        with torch.random.fork_rng([] if model.device.type == "cpu" else [model.device]):
            torch.manual_seed(seed)
            # Checkpoints bring sampling defaults of their own; what is asked for here must not mix with them.
            sequences = model.generate(
                **inputs,
                max_new_tokens=decoding.max_new_tokens,
                repetition_penalty=1.0,
                do_sample=not greedy,
                **({} if greedy else {key: getattr(decoding, key) for key in ("temperature", "top_p", "top_k")}),
            )
        responses = sequences[:, inputs["input_ids"].shape[1] :]
        text = self.processor.batch_decode(responses, skip_special_tokens=True)
        ends = model.generation_config.eos_token_id
        ends = {ends} if isinstance(ends, int) else set(ends or ())
        return [(said, _until(ids, ends), None) for said, ids in zip(text, responses.tolist(), strict=True)]


def _until(ids: list[int], ends: set[int]) -> list[int]:
    """Up to the first end, which is included; the rest is padding."""
    return ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids)) + 1]


def load_any(path: str, device: str | None = None, dtype: str = "auto") -> tuple[Any, Any]:
    """(model in eval mode, processor) of a checkpoint with latents or without, for a `TransformersEngine`.

    Args:
        path: folder or hub id.
        device: None: cuda if there is one.

    Raises CheckpointError: no checkpoint there, or see `load`.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if getattr(AutoConfig.from_pretrained(path), "latent_id", None) is not None:
            return load(path, device, dtype)
        model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype)
        return model.to(device).eval(), AutoProcessor.from_pretrained(path)
    except OSError as error:
        raise CheckpointError(f"{path}: expected a checkpoint folder or a hub id: {error}") from error
