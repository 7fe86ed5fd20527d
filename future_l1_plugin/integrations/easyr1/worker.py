"""EasyR1's worker, with the latent actor, reference and rollout in the place of its own."""

import os
from typing import Any

import torch
import torch.distributed as dist
from verl.protocol import DataProto
from verl.single_controller.base import Worker
from verl.single_controller.base.decorator import Dispatch, register
from verl.utils.fsdp_utils import load_fsdp_model, offload_fsdp_model
from verl.workers import fsdp_workers
from verl.workers.fsdp_workers import FSDPWorker

from future_l1_plugin.integrations.easyr1 import lora, model
from future_l1_plugin.integrations.easyr1.actor import MEDIA, REF_MU, LatentActor, object_array
from future_l1_plugin.integrations.easyr1.dataset import PROMPT, EasyR1Dataset, media
from future_l1_plugin.integrations.easyr1.rollout import LatentRollout, RolloutWeights, build_model
from future_l1_plugin.patches import easyr1_lora


class _Base(Worker):
    """EasyR1 builds the process that holds its workers on their first base, whose methods then hide the worker's."""


class LatentFSDPWorker(_Base, FSDPWorker):
    """Role `actor_rollout_ref`; its config is a `LatentWorkerConfig`."""

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def init_model(self) -> None:
        model.register()
        super().init_model()
        self.actor = LatentActor(self.config.actor, self.fsdp_module, self.config.latent, self.optimizer)
        if self._has_ref:
            self.ref_policy = LatentActor(self.config.ref, self.ref_fsdp_module, self.config.latent)

    def _build_model_optimizer(self, *, fsdp_config: Any, role: str, **kwargs: Any) -> None:
        if not self._is_lora or role != "actor":
            return super()._build_model_optimizer(fsdp_config=fsdp_config, role=role, **kwargs)
        fsdp_config.use_orig_params = True  # trained rows and frozen weights in one flat tensor
        torch.manual_seed(self.config.rollout.seed)  # of the adapters
        with easyr1_lora.with_our_word(fsdp_workers, lora.with_latent_parts, lora.of_one_dtype):
            super()._build_model_optimizer(fsdp_config=fsdp_config, role=role, **kwargs)

    def _build_rollout(self) -> None:
        device = torch.cuda.current_device()
        copy = build_model(self.config.actor.model.model_path, self.model_config, self.config.rollout.dtype)
        self.rollout = LatentRollout(
            self.config.rollout, self.config.latent, self.processor, copy, device, rank=dist.get_rank()
        )
        held = lora.like(copy, self.fsdp_module) if self._is_lora else copy
        self.rollout_sharding_manager = RolloutWeights(self.fsdp_module, held, device, self._use_param_offload)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def save_checkpoint(self, path: str, save_model_only: bool = False) -> None:
        super().save_checkpoint(path, save_model_only)
        if not self._is_lora:
            return
        if self._use_param_offload:
            load_fsdp_model(self.fsdp_module)
        lora.save(self.fsdp_module, self.rollout_sharding_manager.model, os.path.join(path, "lora_adapter"))
        if self._use_param_offload:
            offload_fsdp_model(self.fsdp_module)
        dist.barrier()

    def _process_multi_modal_inputs(self, data: DataProto) -> None:
        """Pixels for the actor, decoded once for all passes over a batch."""
        rows: dict[str, Any] = dict(zip(*(data.non_tensor_batch[key] for key in ("uid", PROMPT)), strict=True))
        self._cache = {
            uid: self._cache.get(uid) or media(EasyR1Dataset.encode(row, self.processor)) for uid, row in rows.items()
        }
        data.non_tensor_batch[MEDIA] = object_array([self._cache[uid] for uid in data.non_tensor_batch["uid"]])

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO)
    def compute_ref_log_probs(self, data: DataProto) -> DataProto:
        output = super().compute_ref_log_probs(data)
        output.non_tensor_batch[REF_MU] = object_array(self.ref_policy.mu)
        return output
