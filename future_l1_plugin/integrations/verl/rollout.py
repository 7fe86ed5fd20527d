"""Rollout backend `latent_hf` for verl: decoding with transformers, on a CPU or on one GPU a replica.

LatentHFReplica   starts one server a replica (`rollout_server.LatentHFServer`) and hands verl its handle
LatentHFAdapter   lives in the trainer's process and sends the weights over
"""

import os
from typing import Any

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from future_l1_plugin.errors import ConfigError
from future_l1_plugin.integrations.verl.host import (
    BaseRollout,
    RolloutConfig,
    RolloutReplica,
    ensure_async_iterator,
    get_platform,
)
from future_l1_plugin.integrations.verl.pixels import Packed, pack
from future_l1_plugin.integrations.verl.rollout_server import WAVE_TIMEOUT_S, LatentHFServer
from future_l1_plugin.model import LatentConfig

# Calls beyond it Ray holds back, and a larger wave would wait for them in vain. It costs no threads.
MAX_CONCURRENCY = 1 << 16


def server_name(replica_rank: int, suffix: str = "") -> str:
    """The name under which Ray knows the server of a replica."""
    return f"latent_hf_server_{replica_rank}{suffix}"


class LatentHFReplica(RolloutReplica):
    """One server a replica; tensor, pipeline and data parallel sizes must be 1."""

    async def launch_servers(self) -> None:
        """Start the server beside the replica's worker and wait until its model is loaded.

        Raises:
            ConfigError: what latent_hf does not have: more than one device a replica, and see `check_config`.
        """
        check_config(self.config)
        if self.is_reward_model or self.is_teacher_model:
            raise ConfigError("rollout.name: latent_hf serves the policy; choose vllm for reward and teacher models")
        (worker,) = self.workers
        platform = get_platform()
        on_cpu = platform.device_name == "cpu"
        resource = None if on_cpu else platform.ray_resource_name()

        def location(worker: Any) -> tuple[str, str | None]:  # a closure: it travels by value, its module stays here
            context = ray.get_runtime_context()
            return context.get_node_id(), resource and context.get_accelerator_ids()[resource][0]

        node, devices = await worker.__ray_call__.remote(location)
        name = server_name(self.replica_rank, self.name_suffix)
        options: dict[str, Any] = {}
        if not on_cpu:
            # As verl's vLLM replica: the actor asks Ray for no GPU of its own (the worker holds it), Ray is told to
            # leave the visible devices alone, and the server sets them. Written after it, not run: no GPU was at hand.
            noset = dict.fromkeys(platform.ray_noset_envvars(), "1")
            options["runtime_env"] = {"env_vars": noset | platform.rollout_env_vars()}
        custom = self.config.custom or {}
        overrides = dict(self.model_config.get("override_config", None) or {})
        server = (
            ray.remote(LatentHFServer)
            .options(
                name=name,
                max_concurrency=MAX_CONCURRENCY,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node, soft=False),
                **options,
            )
            .remote(
                path=self.model_config.get("local_path", None) or self.model_config.path,
                dtype=self.config.dtype,
                device=platform.device_name,
                attn_implementation=overrides.get("attn_implementation"),
                response_length=self.config.response_length,
                max_num_seqs=self.config.max_num_seqs,
                wave_timeout_s=custom.get("wave_timeout_s", WAVE_TIMEOUT_S),
                threads=custom.get("threads"),
                replica_rank=self.replica_rank,
                visible_devices=devices,
                # The actor reads them from here, so the rollout must, too.
                latent_keys={key: overrides[key] for key in overrides if key in LatentConfig.__dataclass_fields__},
            )
        )
        await server.ready.remote()
        self.servers, self._server_handle, self._server_address = [server], server, name


class LatentHFAdapter(BaseRollout):
    """The trainer's side: every rank of the actor has a server of its own and sends it the whole weights."""

    is_leader_rank = True

    def __init__(
        self, config: RolloutConfig, model_config: Any, device_mesh: Any, replica_rank: int = -1, **kwargs: Any
    ) -> None:
        """replica_rank: -1 = this process's rank, which verl leaves in RANK."""
        super().__init__(config, model_config, device_mesh)
        check_config(self.config)
        self.replica_rank = int(os.environ["RANK"]) if replica_rank < 0 else replica_rank
        self._handle: Any = None

    @property
    def _server(self) -> Any:
        if self._handle is None:  # not at construction: verl starts the servers after the actor
            self._handle = ray.get_actor(server_name(self.replica_rank))
        return self._handle

    async def resume(self, tags: list[str]) -> None:
        """Nothing to do: `LatentHFServer.sleep` keeps the weights."""

    async def release(self) -> None:
        """Put the server to sleep."""
        await self._server.sleep.remote()

    async def update_weights(
        self,
        weights: Any,
        wire_format: str = "named_tensors",
        global_steps: int | None = None,
        peft_config: Any = None,
        **kwargs: Any,
    ) -> None:
        """Send the weights in buckets, through host memory.

        Args:
            weights: (name, tensor) pairs, an iterator or an asynchronous one; always drained, because producing them
                takes collectives in which every rank takes part.
            global_steps: their version.

        Raises:
            ConfigError: unmerged LoRA, another wire format, weights that are not those of the server's model.
        """
        if wire_format != "named_tensors":
            raise ConfigError(
                f"wire_format: latent_hf takes named_tensors, found {wire_format}. Set "
                "actor_rollout_ref.rollout.checkpoint_engine.backend=naive"
            )
        if peft_config is not None:
            raise ConfigError(
                "latent_hf takes whole weights, found a LoRA adapter beside them. Set "
                "actor_rollout_ref.model.lora.merge=True"
            )
        limit = self.config.checkpoint_engine.update_weights_bucket_megabytes << 20
        dtype = getattr(torch, self.config.dtype, None)  # None for "auto"
        bucket, size, failure = {}, 0, None
        async for name, tensor in ensure_async_iterator(weights):
            if failure is not None:
                continue
            if size and size + tensor.nbytes > limit:
                failure = await self._send(bucket)
                bucket, size = {}, 0
            # A copy, because the next tensor may be made in the same memory.
            copied = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None, copy=True)
            bucket[name] = pack(copied)
            size += tensor.nbytes
        failure = failure or await self._send(bucket)
        if failure is not None:
            raise failure
        await self._server.finish_weights.remote(global_steps)

    async def _send(self, bucket: dict[str, Packed]) -> ray.exceptions.RayError | None:
        try:
            await self._server.load_weights.remote(bucket)
        except ray.exceptions.RayError as error:  # raised once the weights are drained
            return error
        return None


def check_config(config: RolloutConfig) -> None:
    """Refuse what verl offers and latent_hf does not have. Raises ConfigError with the key."""
    expected = {
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "data_parallel_size": 1,
        "ignore_eos": False,
        "repetition_penalty": 1.0,
        "quantization": None,
    }
    for key, value in expected.items():
        found = getattr(config, key)
        if found != value:
            other = " or choose rollout.name=latent_vllm" if key.endswith("parallel_size") else ""
            raise ConfigError(
                f"actor_rollout_ref.rollout.{key}: latent_hf has none: expected {value}, found {found}. Set it{other}"
            )
