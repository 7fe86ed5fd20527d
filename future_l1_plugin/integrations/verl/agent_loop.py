"""One prompt, one latent rollout: verl's agent loop, its workers and their manager.

Prompts are encoded by the dataset's own function, once a group, so that training sees the frames that SFT and
evaluation see. Latents leave the rollout as a field of the sample; pixels go the way that `pixels` tells.
"""

import asyncio
from typing import Any

import ray
import torch
import transfer_queue as tq
from tensordict import TensorDict

from future_l1_plugin.errors import DataError
from future_l1_plugin.integrations.rl.groups import RolloutError
from future_l1_plugin.integrations.verl.columns import ROLLOUT, WAVE, to_columns
from future_l1_plugin.integrations.verl.failures import ERROR, FATAL, PROMPT_ID, PromptFailed, RequestAborted
from future_l1_plugin.integrations.verl.host import (
    AgentLoopBase,
    AgentLoopManagerTQ,
    AgentLoopMetrics,
    AgentLoopOutput,
    AgentLoopWorker,
    AgentLoopWorkerTQ,
    simple_timer,
    tu,
)
from future_l1_plugin.integrations.verl.names import VLLM_ROLLOUT
from future_l1_plugin.integrations.verl.pixels import SharedPrompt, pixel_dtype, share
from future_l1_plugin.integrations.verl.settings import latent_section
from future_l1_plugin.integrations.verl.watch import GO_ON, Asked, agent_loop_worker, words
from future_l1_plugin.integrations.verl.waves import WaveClient, deal
from future_l1_plugin.la_dapo import Rollout
from future_l1_plugin.model.backbone import PICTURES


class LatentOutput(AgentLoopOutput):
    """verl's output with a `Rollout` in its `extra_fields`, which becomes columns of the sample.

    `processor_inputs` (grids, and the name of the pixels) stays in the process: the worker reads it instead of running
    the processor again.
    """

    processor_inputs: Any = None

    def as_dict(self) -> dict[str, Any]:
        output = super().as_dict()
        output.pop("processor_inputs", None)
        del output["extra_fields"][ROLLOUT]
        return output | to_columns(self.extra_fields[ROLLOUT])


class LatentAgentLoop(AgentLoopBase):
    """A single turn on text, images or video."""

    _latent: Any = None  # the parsed section of the one configuration that this process has
    #: Encoded prompts of the groups under way, as futures: the sessions of a group wait for one encoding.
    _encoded: dict[str, "asyncio.Future[SharedPrompt]"] = {}

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> LatentOutput:
        """One rollout. Raises PromptFailed for what is this prompt's fault: files, length, an aborted request."""
        latent = self._section(self.config)
        wave = dict(kwargs[WAVE])
        validate, n = wave.pop("validate"), wave.pop("n")
        wave["position"] = wave["position"] * n + kwargs["session_id"]
        metrics: dict[str, float] = {}
        params = {
            **sampling_params,
            "max_tokens": self.rollout_config.response_length,
            "latent": {
                "policy": latent.val_policy if validate else latent.policy,
                "tempering": latent.tempering,
                "seed": self.rollout_config.seed,
                "wave": wave,
            },
        }
        # verl sends equal ids to one server: a group's rollouts share one prefill and one pass of the vision tower.
        # Under full_determinism the id is also the request's own in vLLM, where it must be unique.
        request_id = kwargs["uid"]
        if self.rollout_config.full_determinism:
            request_id = f"{request_id}_{kwargs['session_id']}"
        try:
            prompt = await self._encode(kwargs, keep=not validate)
        except DataError as error:
            if self.rollout_config.name != VLLM_ROLLOUT:
                params["latent"]["wave"] = wave | {"absent": True}  # the others of its wave would wait for it
                await self.server_manager.generate(request_id=request_id, prompt_ids=[], sampling_params=params)
            raise PromptFailed(str(error)) from error
        with simple_timer("generate_sequences", metrics):
            try:
                output = await self.server_manager.generate(
                    request_id=request_id,
                    prompt_ids=prompt.prompt_ids,
                    sampling_params=params,
                    mm_inputs=prompt.pixels,
                )
            except RequestAborted as error:  # Ray's copy of it, which shows the server's traceback, too
                raise PromptFailed(str(getattr(error, "cause", error))) from error
        rollout: Rollout | None = output.extra_fields.get(ROLLOUT)
        if rollout is None:  # the engine takes no requests now
            raise PromptFailed(f"its request was {output.stop_reason} before it was decoded")
        return LatentOutput(
            prompt_ids=prompt.prompt_ids,
            response_ids=output.token_ids,
            response_mask=rollout.actions.long().tolist(),
            num_turns=2,
            metrics=AgentLoopMetrics(**metrics),
            extra_fields={**output.extra_fields, "turn_scores": [], "tool_rewards": []},
            processor_inputs=prompt.inputs,
        )

    @classmethod
    def _section(cls, config: Any) -> Any:
        if cls._latent is None:
            cls._latent = latent_section(config)
        return cls._latent

    async def _encode(self, row: dict[str, Any], keep: bool) -> SharedPrompt:
        """The prompt's ids and its pixels in Ray's object store, once for all sessions of a group."""
        key = row["uid"]
        if key not in self._encoded:
            self._encoded[key] = asyncio.ensure_future(asyncio.to_thread(self._encode_once, row, keep))
        return await asyncio.shield(self._encoded[key])

    def _encode_once(self, row: dict[str, Any], keep: bool) -> SharedPrompt:
        encoded = self.dataset_cls.encode(row, self.processor)
        hashed = self.rollout_config.name == VLLM_ROLLOUT
        return share(row["uid"], encoded, pixel_dtype(self.config), hashed, keep)

    @classmethod
    def forget(cls, uid: str) -> None:
        """A group has ended."""
        cls._encoded.pop(uid, None)


class LatentAgentLoopWorker(AgentLoopWorkerTQ.__ray_actor_class__):
    """verl's worker; it tells the trainer why a rollout failed, and keeps what the processor made of a prompt."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # The steps of AgentLoopWorkerTQ.__init__. Ray ships inherited methods by value: a `super()` in one whose class
        # its module offers only as an actor would refer to a copy of that class.
        AgentLoopWorker.__init__(self, *args, **kwargs)
        tq.init()
        self.background_tasks: set[asyncio.Task] = set()
        self._tagging = asyncio.Lock()

    async def _run_prompt(self, prompt: dict, sampling_params: dict, trajectory: dict, trace: bool = False) -> None:
        try:
            await super()._run_prompt(prompt, sampling_params, trajectory, trace)
        finally:
            LatentAgentLoop.forget(prompt["uid"])

    async def _run_agent_loop(self, sampling_params: dict[str, Any], trajectory: dict[str, Any], **kwargs: Any) -> None:
        try:
            return await super()._run_agent_loop(sampling_params, trajectory, **kwargs)
        except Exception as error:
            tag = {PROMPT_ID: str(kwargs["extra_info"]["id"])}
            if isinstance(error, PromptFailed):
                tag |= {ERROR: str(error)}
            else:
                tag |= {ERROR: f"{type(error).__name__}: {error}", FATAL: True}  # stays, whatever a sibling says
            partition = "val" if trajectory["validate"] else "train"
            async with self._tagging:  # TransferQueue reads, merges and writes: siblings would lose each other's tags
                await tq.async_kv_put(key=kwargs["uid"], partition_id=partition, tag=tag)
            raise

    def _compute_multi_modal_inputs(self, output: Any, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        if getattr(output, "processor_inputs", None) is None:
            return super()._compute_multi_modal_inputs(output, input_ids)
        inputs = dict(output.processor_inputs)  # the caller takes keys out of it
        grid = inputs.get(PICTURES.grid)
        if grid is not None:
            inputs["images_seqlens"] = torch.repeat_interleave(grid[:, 1] * grid[:, 2], grid[:, 0])
        return inputs


class LatentAgentLoopManager(AgentLoopManagerTQ):
    """verl's manager; it numbers what is sent out together, so that the rollout server can decode it together.

    A wave is what one server gets of the rollouts of one call: whole groups, dealt in turn. Its batches are then a
    function of its prompts, not of who arrived first. `latent_vllm` needs no common batches; there verl's load balancer
    chooses, a call is one wave, and a place in it is what seeds a request.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.agent_loop_workers_class = ray.remote(LatentAgentLoopWorker)
        self._last: tuple[Any, int] = (None, 0)
        self.asked: dict[str, Asked] = {}  # the prompts of the step, or of the validation, by uid

    def generate_sequences(self, prompts: TensorDict) -> None:
        validate = bool(tu.get(prompts, "validate", False))
        rollout, step = self.config.actor_rollout_ref.rollout, tu.get(prompts, "global_steps", 0)
        n = rollout.val_kwargs.n if validate else rollout.n
        source = ("val" if validate else "train", step)
        if self._last[0] != source:
            self.asked.clear()
        self._last = (source, self._last[1] + 1 if self._last[0] == source else 0)
        engines = len(self.llm_client.servers) if isinstance(self.llm_client, WaveClient) else None
        places = deal(f"{source[0]}-{step}-{self._last[1]}", len(prompts), n, engines)
        tu.assign_non_tensor_stack(prompts, WAVE, [place | {"n": n, "validate": validate} for place in places])
        self._note(prompts)
        try:
            return super().generate_sequences(prompts)
        except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError) as error:
            raise RolloutError(f"an agent-loop worker died before its prompts came: {words(error)} {GO_ON}") from error

    def _note(self, prompts: TensorDict) -> None:
        """Who gets which prompt: verl gives each worker one chunk."""
        uids, extras = ([getattr(x, "data", x) for x in list(prompts[name])] for name in ("uid", "extra_info"))
        for number, rows in enumerate(torch.arange(len(prompts)).chunk(len(self.agent_loop_workers))):
            for i in rows.tolist():
                self.asked[str(uids[i])] = Asked(str(extras[i]["id"]), agent_loop_worker(number))
