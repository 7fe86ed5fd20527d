"""verl's worker with what a CPU needs before its start, and with the vision tower frozen where asked for."""

import os

import torch
from omegaconf import open_dict

from future_l1_plugin.integrations.verl.batch import with_ragged_positions
from future_l1_plugin.integrations.verl.host import (
    ActorRolloutRefWorker,
    Dispatch,
    TrainingWorker,
    get_device_name,
    register,
)
from future_l1_plugin.la_dapo import LatentScoring
from future_l1_plugin.model.backbone import core_of, vision_pattern


class LatentTrainingWorker(TrainingWorker):
    """One model engine; takes batches whose samples happen to be of one length."""

    def train_mini_batch(self, data):
        return super().train_mini_batch(data=with_ragged_positions(data))

    def infer_batch(self, data):
        return super().infer_batch(data=with_ragged_positions(data))


class LatentWorker(ActorRolloutRefWorker):
    """Actor, reference and rollout adapter of one rank."""

    actor_worker_cls = LatentTrainingWorker
    ref_worker_cls = LatentTrainingWorker

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if get_device_name() == "cpu" and not torch.distributed.is_initialized():
            # verl asks for "cpu:gloo,<device>:<backend>", which names the CPU twice.
            torch.distributed.init_process_group(
                "gloo",
                rank=self.rank,
                world_size=self.world_size,
                init_method=os.environ.get("DIST_INIT_METHOD"),  # verl's own way to tell its workers
            )
        if get_device_name() == "cpu":
            # Ray gives each actor one thread. Rollout and training take turns, so the cores are free for either.
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // self.world_size))
            # Gradients of small models underflow to denormal numbers, on which a CPU is several times slower.
            torch.set_flush_denormal(True)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def set_scoring(self, scoring: LatentScoring) -> None:
        """How the rollouts' latents were drawn, for every pass over them."""
        for part in filter(None, (self.actor, self.ref)):
            part.engine.scoring = scoring

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def init_model(self) -> None:
        frozen = "actor" in self.role and self.config.actor.get("freeze_vision_tower", False)
        if frozen and self.config.model.get("lora_rank", 0):
            # PEFT sets an adapter free again whenever it enables adapters: there must be none.
            given = self.config.model.exclude_modules
            with open_dict(self.config.model):
                self.config.model.exclude_modules = vision_pattern() + (f"|{given}" if given else "")
        super().init_model()
        if "actor" in self.role and "rollout" in self.role:
            # "auto" is the checkpoint's dtype, which the actor does not keep.
            self.actor.engine.sync_dtype = getattr(torch, self.config.rollout.dtype, None)
        if frozen:
            core_of(self.actor.engine.module).vision.requires_grad_(False)
