"""A checkpoint, latent or not, that answers many prompts in vLLM: the `model.engine.Engine` of evaluation and curation.

    engine = VllmEngine("outputs/latent-8b", {"tensor_parallel_size": 2})
    for answers in engine.answers(prompts, requests): ..        # requests: makes Requests of a prompt

Prompts are what the processor made of them, as for `model.generate`, so pixels, timestamps and ids are the same. They
are read and encoded in threads, a few ahead of vLLM, and answers come as they are finished: nothing waits for a batch
to begin or to end, and the memory that pixels take does not grow with the number of prompts.
"""

import difflib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from functools import cached_property, partial
from itertools import count
from typing import Any, NamedTuple

from torch import Tensor

from future_l1_plugin.compat import require
from future_l1_plugin.errors import ConfigError
from future_l1_plugin.integrations.vllm import overrides, read_config, with_own
from future_l1_plugin.integrations.vllm.ahead import Ahead
from future_l1_plugin.integrations.vllm.allocator import SLEEPS, check_allocator
from future_l1_plugin.integrations.vllm.media import media_hashes
from future_l1_plugin.model.backbone import PIXEL_KEYS
from future_l1_plugin.model.checkpoint import load_processor
from future_l1_plugin.model.config import LatentConfig
from future_l1_plugin.model.engine import Answer, Batch, Request

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


class _Wanted(NamedTuple):
    """What is kept of a Request while vLLM answers it: no pixels."""

    key: Any
    name: str
    prompt_tokens: int


class VllmEngine:
    """vLLM, on this machine, see `model.engine.Engine`. It starts at the first answer.

    vLLM makes batches as it likes: of a batch of prompts only the encoding is common, each request has its own seed and
    settings. `Answer.seconds` is a share of the time since the last answers, reading of videos included: it goes on
    beside decoding. Latents are not brought back.

    Args:
        path: checkpoint folder or hub id.
        args: of vLLM, see `check_args`.
        dtype: auto (the checkpoint's, float32 included) | float32 | bfloat16 | float16.
        latent: keys of `params` for every request of a latent checkpoint.

    Raises:
        At the first answer: ConfigError, EnvironmentMismatch: see `check_args`. CheckpointError: no checkpoint there.
    """

    def __init__(
        self, path: str, args: Mapping[str, Any], dtype: str = "auto", latent: Mapping[str, Any] | None = None
    ) -> None:
        self._path, self._args, self._dtype, self._latent = path, args, dtype, latent or {}
        self._numbers = count()

    @cached_property
    def _config(self) -> Any:
        return read_config(self._path)

    @cached_property
    def _latent_id(self) -> int | None:
        return getattr(self._config, "latent_id", None)

    @cached_property
    def processor(self) -> Any:
        if self._latent_id is not None:
            return load_processor(self._path, LatentConfig.from_hf(self._config))
        from transformers import AutoProcessor

        return AutoProcessor.from_pretrained(self._path)

    @cached_property
    def _llm(self) -> Any:
        check_args(self._args)
        from vllm import LLM

        stored, dtype = getattr(self._config, "dtype", None), self._dtype  # left to itself, vLLM halves float32
        dtype = str(stored).removeprefix("torch.") if dtype == "auto" and stored is not None else dtype
        args = {"mm_processor_cache_gb": 0, **self._args, "dtype": dtype}  # inputs come processed
        if self._latent_id is not None:
            check_allocator(any(args.get(name) for name in SLEEPS))
            args = {**with_own(args), "hf_overrides": overrides(self._config)}
        return LLM(model=self._path, **args)

    @cached_property
    def _tokenizer(self) -> Any:
        return self._llm.get_tokenizer()

    def describe(self) -> dict[str, Any]:
        return {"name": "vllm", "args": answer_args(self._args)}

    def close(self) -> None:
        self.__dict__.pop("_tokenizer", None)
        if llm := self.__dict__.pop("_llm", None):
            llm.llm_engine.engine_core.shutdown()

    def answers(
        self, batches: Iterable[Batch], requests: Callable[[Batch], Iterable[Request]]
    ) -> Iterator[list[tuple[Any, Answer]]]:
        """(key, answer) of all that is asked, in the order in which they are finished.

        Seeds are the request's own, but who shares a step with it has a say in the last digits.

        Args:
            batches: what `requests` makes Requests of.
            requests: batch -> any number of Requests. Called in threads, a few batches ahead of vLLM, which gets them
                in the order of the batches. Requests of a batch that share their `inputs` are hashed once.

        Raises:
            ConfigError: a prompt and its answer may not fit vLLM's `max_model_len`. Such an error, or what `requests`
                raises, comes after the answers that were under way.
        """
        engine = self._llm.llm_engine
        states = engine.output_processor.request_states
        most = min(WAITING, engine.vllm_config.scheduler_config.max_num_seqs)
        under_way: dict[str, _Wanted] = {}
        waiting: set[str] = set()  # requests without a token yet
        todo: deque[tuple[_Wanted, tuple[Any, Any]]] = deque()
        failure: Exception | None = None
        began = time.perf_counter()
        with Ahead(batches, partial(self._encoded, requests), READ_AHEAD) as encoded:
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
                        seconds, began = (time.perf_counter() - began) / len(done), time.perf_counter()
                        yield [self._answer(under_way.pop(output.request_id), output, seconds) for output in done]
            finally:  # whoever asked may have broken off
                engine.abort_request(list(under_way))
        if failure is not None:
            raise failure

    def _encoded(
        self, requests: Callable[[Batch], Iterable[Request]], batch: Batch
    ) -> list[tuple[_Wanted, tuple[Any, Any]]]:
        """What vLLM is asked about a batch. In a thread."""
        asked = list(requests(batch))
        inputs = {id(request.inputs): self._in_dtype(request.inputs) for request in asked}
        hashes = {which: media_hashes(found) for which, found in inputs.items()}
        return [
            (
                _Wanted(request.key, request.name, request.inputs["input_ids"].shape[1]),
                self._request(request, inputs[id(request.inputs)], hashes[id(request.inputs)]),
            )
            for request in asked
        ]

    def _in_dtype(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Pixels in the model's dtype, to which Qwen3-VL casts them first thing."""
        dtype = self._llm.model_config.dtype
        return {name: value.to(dtype) if name in PIXEL_KEYS else value for name, value in inputs.items()}

    def _request(
        self, request: Request, inputs: Mapping[str, Tensor], hashes: Mapping[str, list[str]]
    ) -> tuple[Any, Any]:
        """(prompt, SamplingParams). inputs, hashes: in the model's dtype, and of these."""
        ids, decoding = request.prompt_ids, request.decoding
        limit, longest = self._llm.model_config.max_model_len, len(ids) + decoding.max_new_tokens
        if longest > limit:
            raise ConfigError(
                f"{request.name}: a prompt of {len(ids)} tokens and an answer of up to {decoding.max_new_tokens} do "
                f"not fit vLLM's max_model_len of {limit}. Set it to at least {longest}, or ask for shorter answers"
            )
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        from future_l1_plugin.integrations.vllm.inputs import engine_input

        latent = None
        if self._latent_id is not None:
            latent = {"latent_seed": request.seed, "latent_return": "none", **self._latent}
        params = SamplingParams(
            temperature=decoding.temperature,
            top_p=decoding.top_p,
            top_k=decoding.top_k,
            max_tokens=decoding.max_new_tokens,
            seed=request.seed,
            extra_args=latent,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        return engine_input(ids, inputs, self._config, hashes), params

    def _answer(self, wanted: _Wanted, output: Any, seconds: float) -> tuple[Any, Answer]:
        (completion,) = output.outputs
        if completion.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"{wanted.name}: vLLM broke off the request: {completion.finish_reason}")
        ids = list(completion.token_ids)
        if self._latent_id is None:
            text, latents = self._tokenizer.decode(ids, skip_special_tokens=True), 0
        else:
            ends = (self._tokenizer.eos_token_id, self._tokenizer.pad_token_id)
            text = self._tokenizer.decode([token for token in ids if token not in ends], skip_special_tokens=False)
            latents = ids.count(self._latent_id)
        return wanted.key, Answer(text, ids, wanted.prompt_tokens, latents, seconds)
