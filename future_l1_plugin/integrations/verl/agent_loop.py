"""One prompt, one latent rollout: verl's agent loop, its workers and their manager.

Prompts are encoded by the dataset's own function, once a group, so that training sees the frames that SFT and
evaluation see. Latents leave the rollout as a field of the sample.
"""

import asyncio
from typing import Any
from uuid import uuid4

import ray
import torch
import transfer_queue as tq
from cachetools import LRUCache
from tensordict import TensorDict
from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopMetrics, AgentLoopOutput, AgentLoopWorker
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ, AgentLoopWorkerTQ
from verl.utils import tensordict_utils as tu
from verl.utils.profiler import simple_timer

from future_l1_plugin.integrations.verl.groups import ERROR
from future_l1_plugin.integrations.verl.plugin import VLLM_ROLLOUT
from future_l1_plugin.integrations.verl.settings import latent_section
from future_l1_plugin.latent.tokens import LATENT

#: Field of a prompt: which decoding wave it belongs to (`LatentAgentLoopManager`).
WAVE = "wave"


class LatentOutput(AgentLoopOutput):
    """verl's output with the latents (k, H) as a field of their own and log-probabilities in float64.

    `processor_inputs` (pixel values and the like) stays in the process: the worker reads it instead of running the
    processor again.
    """

    processor_inputs: Any = None

    def as_dict(self) -> dict[str, Any]:
        output = super().as_dict()
        output.pop("processor_inputs", None)
        output["latents"] = output["extra_fields"].pop("latents")
        # Untempered log-densities are of the order of 1e4, where float32 resolves 1e-3 nats.
        output["rollout_log_probs"] = torch.tensor(self.response_logprobs, dtype=torch.float64)
        return output


class LatentAgentLoop(AgentLoopBase):
    """A single turn on text, images or video."""

    _latent: Any = None  # the parsed section of the one configuration that this process has
    #: Encoded prompts of the groups under way, as futures: the sessions of a group wait for one encoding.
    _encoded: LRUCache = LRUCache(maxsize=1024)

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> LatentOutput:
        latent = self._section(self.config)
        wave = dict(kwargs[WAVE])
        validate, n = wave.pop("validate"), wave.pop("n")
        if wave["id"] is not None:
            wave["position"] = wave["position"] * n + kwargs["session_id"]
        metrics: dict[str, float] = {}
        encoded, shared = await self._encode(kwargs)
        params = {
            **sampling_params,
            "max_tokens": self.rollout_config.response_length,
            "latent": {
                "policy": latent.val_policy if validate else latent.policy,
                "tempering": latent.tempering,
                "seed": self.rollout_config.seed,
                "wave": wave if wave["id"] is not None else None,
            },
        }
        with simple_timer("generate_sequences", metrics):
            output = await self.server_manager.generate(
                request_id=uuid4().hex, prompt_ids=encoded.prompt_ids, sampling_params=params, mm_inputs=shared
            )
        forced = output.extra_fields.pop("forced")
        latent_id = self.tokenizer.convert_tokens_to_ids(LATENT)
        # An end marker that the budget forced is no action; a latent is one, under the id that was forced for it.
        mask = [int(not f or t == latent_id) for t, f in zip(output.token_ids, forced, strict=True)]
        return LatentOutput(
            prompt_ids=encoded.prompt_ids,
            response_ids=output.token_ids,
            response_mask=mask,
            response_logprobs=output.log_probs,
            num_turns=2,
            metrics=AgentLoopMetrics(**metrics),
            extra_fields={**output.extra_fields, "turn_scores": [], "tool_rewards": []},
            processor_inputs=encoded.inputs,
        )

    @classmethod
    def _section(cls, config: Any) -> Any:
        if cls._latent is None:
            cls._latent = latent_section(config)
        return cls._latent

    async def _encode(self, row: dict[str, Any]) -> tuple[Any, Any]:
        """The prompt's ids and processor inputs, and the latter in Ray's object store, for all sessions of a group."""
        key = row["uid"]
        if key not in self._encoded:
            self._encoded[key] = asyncio.ensure_future(self._encode_once(row))
        return await asyncio.shield(self._encoded[key])

    async def _encode_once(self, row: dict[str, Any]) -> tuple[Any, Any]:
        encoded = await asyncio.to_thread(self.dataset_cls.encode, row, self.processor)
        return encoded, ray.put(encoded.inputs)


class LatentAgentLoopWorker(AgentLoopWorkerTQ.__ray_actor_class__):
    """verl's worker; it tells the trainer why a rollout failed, and keeps what the processor made of a prompt."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # The steps of AgentLoopWorkerTQ.__init__. Ray ships inherited methods by value: a `super()` in one whose class
        # its module offers only as an actor would refer to a copy of that class.
        AgentLoopWorker.__init__(self, *args, **kwargs)
        tq.init()
        self.background_tasks: set[asyncio.Task] = set()

    async def _run_agent_loop(self, sampling_params: dict[str, Any], trajectory: dict[str, Any], **kwargs: Any) -> None:
        try:
            return await super()._run_agent_loop(sampling_params, trajectory, **kwargs)
        except Exception as error:
            partition = "val" if trajectory["validate"] else "train"
            reason = f"{type(error).__name__}: {error}"
            await tq.async_kv_put(key=kwargs["uid"], partition_id=partition, tag={ERROR: reason})
            raise

    def _compute_multi_modal_inputs(self, output: Any, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        if getattr(output, "processor_inputs", None) is None:
            return super()._compute_multi_modal_inputs(output, input_ids)
        inputs = dict(output.processor_inputs)  # the caller takes keys out of it
        grid = inputs.get("image_grid_thw")
        if grid is not None:
            inputs["images_seqlens"] = torch.repeat_interleave(grid[:, 1] * grid[:, 2], grid[:, 0])
        return inputs


class LatentAgentLoopManager(AgentLoopManagerTQ):
    """verl's manager; it numbers what is sent out together, so that the rollout server can decode it together.

    A wave is all rollouts of one call. Its batches are then a function of its prompts, not of who arrived first. With
    several servers of `latent_hf`, among which verl's load balancer spreads requests, there are no waves. `latent_vllm`
    needs no common batches; there a place in a wave is what seeds a request.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.agent_loop_workers_class = ray.remote(LatentAgentLoopWorker)
        rollout, trainer = self.config.actor_rollout_ref.rollout, self.config.trainer
        single_server = trainer.n_gpus_per_node * trainer.nnodes == rollout.tensor_model_parallel_size
        self._waves = single_server or rollout.name == VLLM_ROLLOUT
        self._last: tuple[Any, int] = (None, 0)

    def generate_sequences(self, prompts: TensorDict) -> None:
        validate = bool(tu.get(prompts, "validate", False))
        rollout, step = self.config.actor_rollout_ref.rollout, tu.get(prompts, "global_steps", 0)
        n = rollout.val_kwargs.n if validate else rollout.n
        source = ("val" if validate else "train", step)
        self._last = (source, self._last[1] + 1 if self._last[0] == source else 0)
        name = f"{source[0]}-{step}-{self._last[1]}" if self._waves else None
        waves = [
            {"id": name, "size": len(prompts) * n, "position": i, "n": n, "validate": validate}
            for i in range(len(prompts))
        ]
        tu.assign_non_tensor_stack(prompts, WAVE, waves)
        return super().generate_sequences(prompts)
