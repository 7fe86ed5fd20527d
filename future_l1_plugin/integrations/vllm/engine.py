"""A checkpoint, latent or not, that answers many prompts in vLLM: for evaluation and for curation.

    engine = VllmEngine("outputs/latent-8b", {"tensor_parallel_size": 2})
    for answers in engine.answers(Ask(key, prompt_ids, inputs, seed, {"max_tokens": 512}) for ..):

Prompts are what the processor made of them, as for `model.generate`, so pixels, timestamps and ids are the same. They
are read and encoded in threads, a few ahead of vLLM, and answers come as they are finished: nothing waits for a batch
to begin or to end, and the memory that pixels take does not grow with the number of prompts.
"""

import difflib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from itertools import count, groupby
from typing import Any, NamedTuple

from torch import Tensor

from future_l1_plugin.compat import require
from future_l1_plugin.data.prompt import encode_prompt
from future_l1_plugin.data.rollouts import Job, Sampling, Store, fingerprint, seed_of
from future_l1_plugin.errors import ConfigError
from future_l1_plugin.integrations.vllm import overrides, read_config, with_own
from future_l1_plugin.integrations.vllm.ahead import Ahead
from future_l1_plugin.integrations.vllm.allocator import SLEEPS, check_allocator
from future_l1_plugin.integrations.vllm.media import media_hashes
from future_l1_plugin.model.backbone import PIXEL_KEYS
from future_l1_plugin.model.checkpoint import load_processor
from future_l1_plugin.model.config import LatentConfig

#: Prompts that are read or being read ahead of vLLM, and requests that it has and has not begun to answer. Each of them
#: holds its pixels, 40 to 140 MB at 32 frames, and none of them has an answer in the log yet.
READ_AHEAD, WAITING = 16, 48

#: Arguments of vLLM that say how fast and in how much memory, not what is answered: a run may go on under others.
CAPACITY = (
    "block_size",
    "distributed_executor_backend",
    "enforce_eager",
    "gpu_memory_utilization",
    "kv_cache_memory_bytes",
    "limit_mm_per_prompt",
    "max_model_len",  # what does not fit is refused
    "max_num_batched_tokens",
    "max_num_seqs",
    "tensor_parallel_size",
)


def check_args(args: Mapping[str, Any]) -> None:
    """Check arguments of vLLM that a user gives; nothing is loaded.

    Raises:
        EnvironmentMismatch: no vLLM, or a version that is not supported.
        ConfigError: vLLM has no such argument, or it is ours to set.
    """
    require("vllm")
    from vllm import EngineArgs

    known = [field.name for field in fields(EngineArgs)]
    for name in args:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            hint = f"Did you mean {' or '.join(near)}?" if near else "`vllm serve --help=all` lists them"
            raise ConfigError(f"vLLM has no argument {name}. {hint}")
    if taken := sorted({"model", "dtype"} & set(args)):
        raise ConfigError(f"arguments of vLLM: {', '.join(taken)} is set outside of them; leave it out")
    with_own(args)


def answer_args(args: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the arguments that answers depend on."""
    return {name: value for name, value in sorted(args.items()) if name not in CAPACITY}


@dataclass(frozen=True)
class Ask:
    """One answer that is wanted.

    key: handed back with the answer.
    prompt_ids, inputs: what the processor returned for this prompt alone, see `EncodedPrompt`.
    seed: of its tokens and latents, below 2**63.
    sampling: further arguments of `SamplingParams`: max_tokens, and what differs from greedy decoding.
    name: of the prompt, for messages.
    """

    key: Any
    prompt_ids: list[int]
    inputs: Mapping[str, Tensor]
    seed: int
    sampling: Mapping[str, Any]
    name: str = ""


@dataclass(frozen=True)
class Answer:
    """ids: the response, its end-of-sequence token included. text: without that; a latent checkpoint's with its other
    special tokens, as in `LatentOutput`. latents: how many."""

    ids: list[int]
    text: str
    latents: int


class _Wanted(NamedTuple):
    """What is kept of an Ask while vLLM answers it: no pixels."""

    key: Any
    name: str


@contextmanager
def named(name: str) -> Iterator[None]:
    """What is raised inside says which prompt it was about; in our own errors the message says so already."""
    try:
        yield
    except Exception as error:
        error.add_note(f"while the prompt {name} was encoded")
        raise


class VllmEngine:
    """Starts vLLM.

    Args:
        path: checkpoint folder or hub id.
        args: of vLLM, see `check_args`.
        dtype: auto (the checkpoint's, float32 included) | float32 | bfloat16 | float16.
        latent: keys of `params` for every request of a latent checkpoint.

    Raises:
        ConfigError, EnvironmentMismatch: see `check_args`. CheckpointError: no checkpoint there.
    """

    def __init__(
        self, path: str, args: Mapping[str, Any], dtype: str = "auto", latent: Mapping[str, Any] | None = None
    ) -> None:
        check_args(args)
        from vllm import LLM

        config = read_config(path)
        self._latent_id = getattr(config, "latent_id", None)
        self._extra_args = None if self._latent_id is None else {"latent_return": "none", **(latent or {})}
        stored = getattr(config, "dtype", None)  # left to itself, vLLM halves float32
        dtype = str(stored).removeprefix("torch.") if dtype == "auto" and stored is not None else dtype
        args = {"mm_processor_cache_gb": 0, **args, "dtype": dtype}  # inputs come processed
        if self._latent_id is not None:
            check_allocator(any(args.get(name) for name in SLEEPS))
            args = {**with_own(args), "hf_overrides": overrides(config)}
        self._llm = LLM(model=path, **args)
        self._config, self._tokenizer = config, self._llm.get_tokenizer()
        self._numbers = count()

    def answers(
        self, items: Iterable[Any], encode: Callable[[Any], Iterable[Ask]] = lambda ask: (ask,)
    ) -> Iterator[list[tuple[Any, Answer]]]:
        """(key, answer) of all that is asked, in the order in which they are finished.

        Seeds are the request's own, but who shares a step with it has a say in the last digits.

        Args:
            items: Asks, or what `encode` makes Asks of.
            encode: item -> any number of Asks. Called in threads, a few items ahead of vLLM; requests are made in the
                order of the items. Asks of one item that share their `inputs` are hashed once.

        Raises:
            ConfigError: a prompt and its answer may not fit vLLM's `max_model_len`. Such an error, or what `encode`
                raises, comes after the answers that were under way.
        """
        engine = self._llm.llm_engine
        states = engine.output_processor.request_states
        most = min(WAITING, engine.vllm_config.scheduler_config.max_num_seqs)
        under_way: dict[str, _Wanted] = {}
        waiting: set[str] = set()  # requests without a token yet
        todo: deque[tuple[_Wanted, tuple[Any, Any]]] = deque()
        failure: Exception | None = None
        with Ahead(items, partial(self._requests, encode), READ_AHEAD) as encoded:
            try:
                while True:
                    waiting = {request for request in waiting if request in states and states[request].is_prefilling}
                    # With something to decode nobody waits for a video.
                    while failure is None and len(waiting) < most and (todo or encoded.ready or not under_way):
                        if todo:
                            wanted, request = todo.popleft()
                            number = str(next(self._numbers))
                            waiting.add(engine.add_request(number, *request))
                            under_way[number] = wanted
                            del request  # and its pixels
                            continue
                        try:
                            todo.extend(next(encoded))
                        except StopIteration:
                            break
                        except Exception as error:
                            failure = error
                    if not under_way:
                        break
                    if done := [output for output in engine.step() if output.finished]:
                        yield [self._answer(under_way.pop(output.request_id), output) for output in done]
            finally:  # whoever asked may have broken off
                engine.abort_request(list(under_way))
        if failure is not None:
            raise failure

    def _requests(self, encode: Callable[[Any], Iterable[Ask]], item: Any) -> list[tuple["_Wanted", tuple[Any, Any]]]:
        """What vLLM is asked about an item. In a thread."""
        asked = list(encode(item))
        inputs = {id(ask.inputs): self._in_dtype(ask.inputs) for ask in asked}
        hashes = {which: media_hashes(found) for which, found in inputs.items()}
        return [
            (_Wanted(ask.key, ask.name), self._request(ask, inputs[id(ask.inputs)], hashes[id(ask.inputs)]))
            for ask in asked
        ]

    def _in_dtype(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Pixels in the model's dtype, to which Qwen3-VL casts them first thing."""
        dtype = self._llm.model_config.dtype
        return {name: value.to(dtype) if name in PIXEL_KEYS else value for name, value in inputs.items()}

    def _request(self, ask: Ask, inputs: Mapping[str, Tensor], hashes: Mapping[str, list[str]]) -> tuple[Any, Any]:
        limit, longest = self._llm.model_config.max_model_len, len(ask.prompt_ids) + ask.sampling["max_tokens"]
        if longest > limit:
            raise ConfigError(
                f"{ask.name}: a prompt of {len(ask.prompt_ids)} tokens and an answer of up to "
                f"{ask.sampling['max_tokens']} do not fit vLLM's max_model_len of {limit}. Set it to at least "
                f"{longest}, or ask for shorter answers"
            )
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        from future_l1_plugin.integrations.vllm.inputs import engine_input

        latent = self._extra_args and {"latent_seed": ask.seed, **self._extra_args}
        sampling = {"temperature": 0.0, **ask.sampling, "seed": ask.seed, "extra_args": latent}
        params = SamplingParams(**sampling, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY)
        return engine_input(ask.prompt_ids, inputs, self._config, hashes), params

    def _answer(self, wanted: "_Wanted", output: Any) -> tuple[Any, Answer]:
        (completion,) = output.outputs
        if completion.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"{wanted.name}: vLLM broke off the request: {completion.finish_reason}")
        ids = list(completion.token_ids)
        if self._latent_id is None:
            return wanted.key, Answer(ids, self._tokenizer.decode(ids, skip_special_tokens=True), 0)
        ends = (self._tokenizer.eos_token_id, self._tokenizer.pad_token_id)
        text = self._tokenizer.decode([token for token in ids if token not in ends], skip_special_tokens=False)
        return wanted.key, Answer(ids, text, ids.count(self._latent_id))

    def close(self) -> None:
        """Give back memory and processes."""
        self._llm.llm_engine.engine_core.shutdown()


class VllmRollouts:
    """Curation's engine `vllm`, see `data.rollouts.Engine`. vLLM starts at the first answer that is missing.

    Raises:
        At the first answer: see `VllmEngine`, `encode_prompt`.
    """

    def __init__(self, model: str, sampling: Sampling, args: Mapping[str, Any], dtype: str = "auto") -> None:
        self._path, self._sampling, self._args, self._dtype = model, sampling, args, dtype

    def identity(self) -> list[Any]:
        return ["vllm", *fingerprint(self._path), self._dtype, answer_args(self._args)]

    def run(self, jobs: Sequence[Job], done: Callable[[Job], bool], store: Store) -> list[str]:
        jobs = [job for job in jobs if not done(job)]
        if jobs:
            engine = VllmEngine(self._path, self._args, self._dtype)
            try:
                prompts = (list(group) for _, group in groupby(jobs, key=lambda job: job.prompt))
                for answers in engine.answers(prompts, partial(self._asks, self._processor())):
                    store([(job, answer.text) for job, answer in answers])
            finally:
                engine.close()
        return []

    def _processor(self) -> Any:
        from transformers import AutoProcessor

        config = read_config(self._path)
        if getattr(config, "latent_id", None) is None:
            return AutoProcessor.from_pretrained(self._path)
        return load_processor(self._path, LatentConfig.from_hf(config))

    def _asks(self, processor: Any, jobs: list[Job]) -> list[Ask]:
        """Of jobs that share their prompt: answers to one stand side by side."""
        prompt = jobs[0].prompt
        name = f"{prompt.id} {prompt.pool or ''}".strip()
        with named(name):
            encoded = encode_prompt(prompt, processor)
        sampling = {"max_tokens": self._sampling.max_new_tokens, "temperature": self._sampling.temperature}
        return [
            Ask(job, encoded.prompt_ids, encoded.media, seed_of(self._sampling.seed, job.key), sampling, name)
            for job in jobs
        ]
