"""Rollout backend `latent_vllm` for verl: its vLLM backend, with latents.

verl's own server, weight transfer, sleep and wake are used as they are. What differs is a request: it brings the
processor's output instead of pictures, asks for latents, and its response has them, with log-probabilities of all
actions as the actor computes them.
"""

import asyncio
import json
from collections.abc import Iterable
from typing import Any

import ray
import torch
from vllm import SamplingParams
from vllm.outputs import RequestOutput

from future_l1_plugin.errors import ConfigError
from future_l1_plugin.integrations.verl.columns import ENGINE_NUMBER, ROLLOUT
from future_l1_plugin.integrations.verl.failures import RequestAborted
from future_l1_plugin.integrations.verl.host import (
    TokenOutput,
    vLLMColocateWorkerExtension,
    vLLMHttpServer,
    vLLMReplica,
)
from future_l1_plugin.integrations.verl.names import VLLM_ROLLOUT as NAME
from future_l1_plugin.integrations.verl.pixels import opened
from future_l1_plugin.integrations.verl.sampling import Sampling, seed_of
from future_l1_plugin.integrations.vllm import overrides, read_latents, with_own
from future_l1_plugin.integrations.vllm.inputs import engine_input
from future_l1_plugin.la_dapo import LatentScoring, make_rollouts
from future_l1_plugin.model import LatentConfig


class LatentVLLMReplica(vLLMReplica):
    """One engine a replica, over `tensor_model_parallel_size` devices."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.is_reward_model or self.is_teacher_model:
            raise ConfigError(f"rollout.name: {NAME} serves the policy; choose vllm for reward and teacher models")
        self.server_class = ray.remote(LatentVLLMServer)

    def _get_server_name_prefix(self) -> str:
        return f"{NAME}_"


class LatentVLLMServer(vLLMHttpServer):
    """verl's server; see the module."""

    def _apply_quantization(self) -> tuple[str | None, dict[str, Any]]:
        quantization, theirs = super()._apply_quantization()
        # The actor reads latent keys from here, so the rollout must, too.
        given = dict(self.model_config.get("override_config", None) or {})
        latent = {key: value for key, value in given.items() if key in LatentConfig.__dataclass_fields__}
        return quantization, theirs | latent | overrides(self.model_config.hf_config)

    def _preprocess_engine_kwargs(self, engine_kwargs: dict[str, Any]) -> None:
        super()._preprocess_engine_kwargs(engine_kwargs)
        engine_kwargs |= with_own(engine_kwargs)

    def _get_worker_extension_cls(self) -> str:
        return f"{__name__}.LatentWorkerExtension"

    async def generate(
        self,
        prompt_ids: Iterable[int],
        sampling_params: dict[str, Any],
        request_id: str,
        image_data: Any = None,
        video_data: Any = None,
        mm_inputs: dict[str, Any] | None = None,
        mm_processor_kwargs: dict[str, Any] | None = None,
        priority: int = 0,
        **more: Any,
    ) -> TokenOutput:
        """Decode one response. Arguments, result and errors are those of `LatentHFServer.generate`.

        A request's noise depends on its wave's name and its place in it alone. What else shares its steps can change a
        result only by the rounding of larger or smaller matrix products.
        """
        if unknown := sorted(key for key, value in more.items() if value is not None):
            raise ConfigError(f"request {request_id}: {NAME} does not take {', '.join(unknown)}")
        sampling, wave = Sampling.parse(sampling_params, self.config.response_length)
        policy, seed = json.loads(sampling.policy), seed_of(sampling.seed, wave.id, wave.position)
        latent_args = {f"latent_{'policy' if key == 'name' else key}": value for key, value in policy.items()}
        pixels, hashes = opened(mm_inputs)
        # In a thread: placeholders are counted, and the loop has other requests to serve.
        prompt = await asyncio.to_thread(
            engine_input, list(prompt_ids), pixels, self.model_config.hf_config, hashes=hashes
        )
        output = await self._run(
            prompt,
            SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                max_tokens=sampling.max_tokens,
                seed=seed,
                logprobs=0,
                detokenize=False,
                extra_args={**latent_args, "latent_seed": seed, "latent_return": "means", "latent_form": "bytes"},
            ),
            request_id,
            priority,
        )
        if output is None:
            return TokenOutput(token_ids=[], stop_reason="aborted", extra_fields={"global_steps": self.global_steps})
        (answer,), got = output.outputs, read_latents(output)
        latent = LatentConfig.from_hf(self.model_config.hf_config)
        token_logprobs = [entry[t].logprob for entry, t in zip(answer.logprobs, answer.token_ids, strict=True)]
        (rollout,) = make_rollouts(
            [torch.tensor(answer.token_ids)],
            [got.forced],
            [torch.tensor(token_logprobs)],
            [got.latents],  # in the model's dtype, as they were fed
            [got.means],
            None if latent.budget.exact else [got.end_logprobs],
            latent_id=latent.tokens.latent,
            scoring=LatentScoring.build(policy, sampling.tempering),
        )
        return TokenOutput(
            token_ids=list(answer.token_ids),
            stop_reason="completed",
            extra_fields={
                ROLLOUT: rollout.checked(f"request {request_id}"),
                "global_steps": self.global_steps,
                ENGINE_NUMBER: self.replica_rank,
            },
        )

    async def _run(self, prompt: Any, params: SamplingParams, request_id: str, priority: int) -> RequestOutput | None:
        """The finished request; None if the server takes none now and verl shall ask another.

        Raises RequestAborted.
        """
        if await self._park_until_admitted(request_id) is not None:
            return None
        last: RequestOutput | None = None
        if "mm_kwargs" in prompt:
            # Pixels go to the engine's process with the first of a group's requests only; the others name them.
            self.engine.input_processor.inject_into_mm_cache(prompt["mm_hashes"], prompt["mm_kwargs"])
        try:
            async for output in self.engine.generate(prompt, params, request_id, priority=priority):
                if last is None:  # verl counts requests that it let in and of which the engine has not yet been heard
                    self._admitting -= 1
                last = output
        finally:
            if last is None:
                self._admitting -= 1
        reason = last.outputs[0].finish_reason if last is not None and last.outputs else "abort"
        if reason in ("abort", "error"):  # "error": vLLM could not process it, or missed its pixels in a cache
            raise RequestAborted(f"request {request_id}: vLLM ended it with {reason!r}, see the engine's log")
        return last


class LatentWorkerExtension(vLLMColocateWorkerExtension):
    """In vLLM's worker: what the sampler must not choose is hidden from it after log-probabilities were taken."""

    def monkey_patch_model(self, vocab_size: int, banned_token_ids: list[int] | None = None) -> None:
        self.model_runner.model_state.tokenizer_size = vocab_size
