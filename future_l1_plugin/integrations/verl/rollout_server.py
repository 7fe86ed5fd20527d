"""The server behind `latent_hf`: requests in, batches through `model.generate`, responses with latents out.

What a request may ask for is in `sampling`.

A wave is decoded when all of its requests have come, in batches that depend on nothing but the wave, each with a random
stream of its own. So the same wave on the same weights gives the same result, whatever the order of arrival. A wave has
to reach one server whole (`waves`).

The file is one state machine, and therefore longer than others: what waits, what is decoded, who is told, and what verl
may ask of the server in between.
"""

import asyncio
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from future_l1_plugin.errors import ConfigError, UserError
from future_l1_plugin.integrations.rl.rollouts import rollouts_of
from future_l1_plugin.integrations.verl.columns import ENGINE_NUMBER, ROLLOUT
from future_l1_plugin.integrations.verl.failures import RequestAborted
from future_l1_plugin.integrations.verl.host import TokenOutput, copy_to_local, get_platform
from future_l1_plugin.integrations.verl.pixels import Packed
from future_l1_plugin.integrations.verl.rollout_inputs import model_inputs
from future_l1_plugin.integrations.verl.rollout_weights import ServedWeights
from future_l1_plugin.integrations.verl.sampling import Sampling, Wave, seed_of
from future_l1_plugin.la_dapo import LatentScoring, Rollout
from future_l1_plugin.model import LatentConfig, generate, load
from future_l1_plugin.model.batch import left_padded

WAVE_TIMEOUT_S = 120.0


@dataclass(eq=False)
class _Request:
    id: str
    inputs: dict[str, Tensor]
    sampling: Sampling
    answer: asyncio.Future
    position: int = 0  # in its wave

    @property
    def length(self) -> int:
        return self.inputs["input_ids"].shape[1]


@dataclass
class _Group:
    """Requests that wait to be decoded together."""

    sampling: Sampling
    size: int
    requests: dict[int, _Request | None] = field(default_factory=dict)  # by position; None where none will come
    timer: asyncio.TimerHandle | None = None

    def came(self) -> list[_Request]:
        return [request for request in self.requests.values() if request is not None]

    def restart(self, seconds: float, call: Any, *args: Any) -> None:
        self.stop()
        self.timer = asyncio.get_running_loop().call_later(seconds, call, *args)

    def stop(self) -> None:
        if self.timer is not None:
            self.timer.cancel()


class LatentHFServer:
    """Decodes for one replica: a plain class, of which the replica makes a Ray actor.

    What verl calls are coroutines; whatever touches the model runs in one thread of its own, one thing after the other.
    """

    def __init__(
        self,
        path: str,
        dtype: torch.dtype | str = "bfloat16",
        device: str = "cpu",
        attn_implementation: str | None = None,
        response_length: int = 512,
        max_num_seqs: int = 64,
        wave_timeout_s: float = WAVE_TIMEOUT_S,
        threads: int | None = None,
        replica_rank: int = 0,
        visible_devices: str | None = None,
        latent_keys: dict[str, Any] | None = None,
    ) -> None:
        """
        Args:
            path: of a latent checkpoint; its weights serve until the trainer sends others.
            response_length: longest response, in tokens, where a request gives no `max_tokens`.
            max_num_seqs: largest batch.
            wave_timeout_s: seconds after the last arrival at which an incomplete wave fails.
            threads: of torch, for decoding on a CPU; None = as they are.
            visible_devices: for the platform's variable (CUDA_VISIBLE_DEVICES), before the device is first used.
            latent_keys: latent keys to use instead of the checkpoint's, as in `load`.

        Raises:
            CheckpointError, ConfigError: as `load`.
        """
        if visible_devices is not None:
            os.environ[get_platform().visible_devices_envvar()] = visible_devices
        self._model, self._processor = load(
            copy_to_local(str(path)), device, dtype, attn_implementation, **(latent_keys or {})
        )
        self._device = device
        self._latent = LatentConfig.from_hf(self._model.config)
        self._weights = ServedWeights(self._model)
        self._response_length, self._max_num_seqs = response_length, max_num_seqs
        self._wave_timeout_s, self._replica_rank = wave_timeout_s, replica_rank
        self._thread = ThreadPoolExecutor(1, "latent_hf", initializer=_prepare_thread, initargs=(threads,))
        self._open, self._rejecting = asyncio.Event(), False
        self._open.set()
        self._requests: dict[_Request, None] = {}  # not yet answered, in the order of arrival
        self._turn = asyncio.Lock()  # held for a batch
        self._running: list[_Request] = []  # the batch that is being decoded
        self._waves: dict[str, _Group] = {}
        self._tasks: set[asyncio.Task] = set()  # asyncio itself keeps only weak references

    async def ready(self) -> None:
        """Returns once the model is loaded."""

    # Requests ------------------------------------------------------------------------------------------------------

    async def generate(
        self,
        prompt_ids: Iterable[int],
        sampling_params: dict[str, Any],
        request_id: str,
        image_data: Any = None,
        video_data: Any = None,
        mm_inputs: dict[str, Tensor] | None = None,
        mm_processor_kwargs: dict[str, Any] | None = None,
        **more: Any,
    ) -> TokenOutput:
        """Decode one response.

        Args:
            prompt_ids: the prompt's ids with every image and video placeholder written out, as the processor does.
            sampling_params: see the module.
            image_data, video_data, mm_processor_kwargs: what `mm_inputs` were made from; not looked at.
            mm_inputs: what the processor returned for this prompt, batch dimension 1, as tensors or as
                `pixels.share` packs them. None for text alone.

        Returns:
            token_ids (T), the end-of-sequence token included; log_probs (T) in nats:
                text            log-softmax at the request's temperature (1 if greedy); top-p and top-k do not enter
                `<|latent|>`    tempered log-density of z, plus log(1 - p(end)) where the budget leaves that choice
                forced markers  0
            stop_reason "completed" at an end-of-sequence token and at max_tokens, as verl's vLLM backend says;
            extra_fields: `latents` (k, H) in the model's dtype, the very numbers that were fed, and `latent_means`, the
            mu around which they were drawn; `forced` 0 or 1 a token, 1 where the grammar chose the id (`<|latent|>`
            included); `global_steps`, the version of the weights.

        Raises:
            ConfigError: wrong sampling parameters or inputs, or a wave whose requests do not agree.
            TimeoutError: the wave stayed incomplete.
            RequestAborted: the request was given up.
            RuntimeError: decoding failed, or an update of the weights is not finished.
        """
        if unknown := sorted(key for key, value in more.items() if value is not None):
            raise ConfigError(f"request {request_id}: latent_hf does not take {', '.join(unknown)}")
        sampling, wave = Sampling.parse(sampling_params, self._response_length)
        if wave.absent:
            self._join_wave(None, wave, sampling)
            return TokenOutput(
                token_ids=[], stop_reason="aborted", extra_fields={"global_steps": self._weights.version}
            )
        inputs = model_inputs(self._model.config, prompt_ids, mm_inputs, request_id)
        while not self._open.is_set():
            if self._rejecting:
                raise RequestAborted(f"request {request_id}: rejected, this server has stopped generation")
            await self._open.wait()
        if self._weights.updating:
            raise RuntimeError(
                f"request {request_id}: the weights are half updated. Expected finish_weights to come first; if an "
                "update failed, its error says why"
            )
        request = _Request(request_id, inputs, sampling, asyncio.get_running_loop().create_future())
        self._requests[request] = None
        request.answer.add_done_callback(lambda _: self._requests.pop(request, None))
        self._join_wave(request, wave, sampling)
        return await request.answer

    def _join_wave(self, request: _Request | None, wave: Wave, sampling: Sampling) -> None:
        group = self._waves.setdefault(wave.id, _Group(sampling, wave.size))
        wrong = ""
        if sampling != group.sampling:
            wrong = f"expected one setting for all of its requests, found {group.sampling} and {sampling}"
        elif wave.size != group.size:
            wrong = f"expected one size, found {group.size} and {wave.size}"
        elif wave.position in group.requests:
            wrong = f"position {wave.position} came twice"
        if wrong:
            group.stop()
            del self._waves[wave.id]
            _fail([*group.came(), *filter(None, [request])], ConfigError(f"wave {wave.id!r}: {wrong}"))
            return
        if request is not None:
            request.position = wave.position
        group.requests[wave.position] = request
        if len(group.requests) < group.size:
            group.restart(self._wave_timeout_s, self._expire, wave.id)
            return
        group.stop()
        del self._waves[wave.id]
        self._start(group.came(), wave.id)

    def _expire(self, wave_id: str) -> None:
        group = self._waves.pop(wave_id)
        came = len(group.requests)
        _fail(
            group.came(),
            TimeoutError(
                f"wave {wave_id!r}: expected {group.size} requests, {came} came and no other for "
                f"{self._wave_timeout_s:g} s. A wave must reach one server whole; where encoding takes longer, raise "
                "actor_rollout_ref.rollout.custom.wave_timeout_s"
            ),
        )

    def _start(self, requests: list[_Request], stream: str) -> None:
        requests.sort(key=lambda request: (request.length, request.position))  # little padding
        batches = [requests[i : i + self._max_num_seqs] for i in range(0, len(requests), self._max_num_seqs)]
        task = asyncio.create_task(self._decode_all(batches, stream))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _decode_all(self, batches: list[list[_Request]], stream: str) -> None:
        for index, batch in enumerate(batches):
            try:
                await self._answer(batch, stream, index)
            except Exception as error:  # of any kind: whoever waits for this batch must get to know
                if not isinstance(error, UserError):
                    said = f"latent_hf: decoding a batch of {len(batch)} failed: {type(error).__name__}: {error}"
                    error = RuntimeError(said)
                _fail(batch, error)

    async def _answer(self, batch: list[_Request], stream: str, index: int) -> None:
        async with self._turn:
            if all(request.answer.done() for request in batch):  # aborted or cancelled while it waited
                return
            self._running = batch
            try:
                results = await self._in_thread(self._decode, batch, stream, index)
                for request, result in zip(batch, results, strict=True):
                    if not request.answer.done():
                        request.answer.set_result(result)
            finally:
                self._running = []

    async def _in_thread(self, call: Any, *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call, *args)

    # In the thread -------------------------------------------------------------------------------------------------

    def _decode(self, batch: list[_Request], stream: str, index: int) -> list[TokenOutput]:
        sampling = batch[0].sampling
        scoring = LatentScoring.build(json.loads(sampling.policy), sampling.tempering)
        pad = self._processor.tokenizer.pad_token_id
        with torch.no_grad():
            out = generate(
                self._model,
                left_padded([request.inputs for request in batch], pad, self._device),
                policy=scoring.policy,
                max_new_tokens=sampling.max_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                generator=torch.Generator(self._device).manual_seed(seed_of(sampling.seed, stream, index)),
                record_means=True,
            )
            rollouts = rollouts_of(out, self._latent, scoring)
        return [
            self._output(rollout.checked(f"request {request.id}").on("cpu"))
            for request, rollout in zip(batch, rollouts, strict=True)
        ]

    def _output(self, rollout: Rollout) -> TokenOutput:
        return TokenOutput(
            token_ids=rollout.ids.tolist(),
            stop_reason="completed",
            extra_fields={ROLLOUT: rollout, "global_steps": self._weights.version, ENGINE_NUMBER: self._replica_rank},
        )

    # Weights -------------------------------------------------------------------------------------------------------

    async def load_weights(self, bucket: dict[str, Tensor | Packed]) -> None:
        """Write some of the weights; until `finish_weights` requests are refused.

        Args:
            bucket: name in the model's state dict -> the weight in any dtype, as a tensor or from `pack`.

        Raises:
            ConfigError: a name that the model does not have, or another shape.
            RuntimeError: requests are waiting or being decoded.
        """
        if self._requests:
            raise RuntimeError(
                f"load_weights while {len(self._requests)} requests wait or are decoded: call sleep or "
                "abort_all_requests first"
            )
        self._weights.updating = True
        await self._in_thread(self._weights.write, bucket)

    async def finish_weights(self, global_steps: int | None = None) -> None:
        """The last bucket has come: from now on the weights count as version `global_steps`.

        Raises:
            ConfigError: weights of the model that no bucket brought (of tied ones one will do).
        """
        self._weights.finish(global_steps)

    # Control -------------------------------------------------------------------------------------------------------

    async def sleep(self) -> None:
        """Fail the requests that wait, let the batch that is being decoded end, give unused memory back."""
        self._fail_waiting("the server was put to sleep")
        async with self._turn:
            await self._in_thread(_free_memory, self._device)

    async def wake_up(self, tags: list[str] | None = None) -> None:
        """Nothing to do: the weights stay where they are."""

    async def abort_all_requests(self, reset_prefix_cache: bool = True, reject_request: bool = False) -> dict[str, Any]:
        """Fail the requests that wait and let the batch that is being decoded end.

        Requests that come before `resume_generation` are held back, or refused with `reject_request`.

        Returns:
            {"aborted_count": int, "request_ids": list[str]}
        """
        self._open.clear()
        self._rejecting = reject_request
        aborted = self._fail_waiting("generation was aborted")
        await self.wait_for_requests_to_drain()
        return {"aborted_count": len(aborted), "request_ids": aborted}

    async def resume_generation(self) -> None:
        """Take requests again."""
        self._rejecting = False
        self._open.set()

    async def wait_for_requests_to_drain(self) -> None:
        """Returns once every request that has come so far is answered."""
        if self._requests:
            await asyncio.wait([request.answer for request in self._requests])

    async def clear_kv_cache(self) -> None:
        """Nothing to do, here and below: no cache outlives its batch."""

    async def release_kv_cache(self) -> None:
        pass

    async def resume_kv_cache(self) -> None:
        pass

    async def start_profile(self, **kwargs: Any) -> None:
        """Nothing to do: the server has no profiler of its own."""

    async def stop_profile(self) -> None:
        pass

    def _fail_waiting(self, why: str) -> list[str]:
        for group in self._waves.values():
            group.stop()
        self._waves.clear()
        waiting = [request for request in self._requests if request not in self._running]
        for request in waiting:
            _fail([request], RequestAborted(f"request {request.id}: {why} before it was decoded"))
        return [request.id for request in waiting]


def _prepare_thread(threads: int | None) -> None:
    # Both hold for a thread and those it starts. Denormal numbers, which a briefly trained model is full of, are slow.
    torch.set_flush_denormal(True)
    if threads is not None:
        torch.set_num_threads(threads)


def _free_memory(device: str) -> None:
    if device != "cpu":
        torch.cuda.empty_cache()


def _fail(requests: list[_Request], error: Exception) -> None:
    for request in requests:
        if not request.answer.done():
            request.answer.set_exception(error)
