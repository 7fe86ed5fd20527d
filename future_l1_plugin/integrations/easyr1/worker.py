"""EasyR1's worker, with the latent actor, reference and rollout in the place of its own."""

from typing import Any

import torch
import torch.distributed as dist
from verl.protocol import DataProto
from verl.single_controller.base import Worker
from verl.single_controller.base.decorator import Dispatch, register
from verl.workers.fsdp_workers import FSDPWorker

from future_l1_plugin.integrations.easyr1 import model
from future_l1_plugin.integrations.easyr1.actor import MEDIA, REF_MU, LatentActor, object_array
from future_l1_plugin.integrations.easyr1.dataset import PROMPT, EasyR1Dataset, media
from future_l1_plugin.integrations.easyr1.rollout import LatentRollout, RolloutWeights, build_model


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

    def _build_rollout(self) -> None:
        device = torch.cuda.current_device()
        copy = build_model(self.config.actor.model.model_path, self.model_config, self.config.rollout.dtype)
        self.rollout = LatentRollout(
            self.config.rollout, self.config.latent, self.processor, copy, device, rank=dist.get_rank()
        )
        self.rollout_sharding_manager = RolloutWeights(self.fsdp_module, copy, device, self._use_param_offload)

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
