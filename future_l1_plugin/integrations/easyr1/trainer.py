"""EasyR1's trainer and runner, with LA-DAPO's groups, rewards and advantage. The training loop is EasyR1's own."""

import uuid
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from verl.protocol import DataProto
from verl.single_controller.ray import RayWorkerGroup
from verl.trainer.core_algos import AdvantageEstimator, register_adv_estimator
from verl.trainer.ray_trainer import RayPPOTrainer, ResourcePoolManager, Role
from verl.utils.checkpoint import remove_obsolete_ckpt
from verl.utils.tokenizer import get_processor

from future_l1_plugin.errors import CheckpointError
from future_l1_plugin.integrations.easyr1.actor import STEP
from future_l1_plugin.integrations.easyr1.checkpoints import NAME, finish, settle
from future_l1_plugin.integrations.easyr1.config import LaDapoConfig
from future_l1_plugin.integrations.easyr1.dataset import PROMPT, create_dataloaders
from future_l1_plugin.integrations.easyr1.resume import check_same_run
from future_l1_plugin.integrations.easyr1.reward import CORRECT, DROPPED, LatentRewardManager, samples_of
from future_l1_plugin.integrations.easyr1.worker import LatentFSDPWorker
from future_l1_plugin.integrations.rl.groups import GroupFilter, RolloutError, Verdict
from future_l1_plugin.integrations.rl.metrics import span_metrics
from future_l1_plugin.integrations.rl.settings import checked_rewards
from future_l1_plugin.la_dapo import la_dapo_advantage
from future_l1_plugin.latent import LatentTokens
from future_l1_plugin.resume import delete, fault


@register_adv_estimator(AdvantageEstimator.GRPO)
def advantage(
    token_level_rewards: torch.Tensor, response_mask: torch.Tensor, index: Any, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Under EasyR1's name `grpo`: its trainer takes no other than its own names. Differs where all scores are equal."""
    return la_dapo_advantage(token_level_rewards, response_mask, index)


class LaDapoTrainer(RayPPOTrainer):
    """See the module."""

    def __init__(self, config: LaDapoConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.tokens = LatentTokens.from_tokenizer(self.tokenizer)
        bounds = (config.algorithm.filter_low, config.algorithm.filter_high)
        self._filter = GroupFilter(
            bounds if config.algorithm.online_filtering else None,
            "trainer.max_try_make_batch",
            "algorithm.online_filtering=false",
        )
        self._loaded: int | None = None  # step of the checkpoint that the run went on from

    def _load_checkpoint(self) -> None:
        trainer = self.config.trainer
        if trainer.load_checkpoint_path is None and trainer.find_last_checkpoint:
            for line in settle(Path(trainer.save_checkpoint_path)):
                print(line)
        super()._load_checkpoint()
        self._loaded = self.global_step

    def _save_checkpoint(self) -> None:
        """EasyR1's, but old checkpoints go when the new one is whole."""
        trainer = self.config.trainer
        folder = Path(trainer.save_checkpoint_path)
        checkpoint = folder / NAME.format(self.global_step)
        if self.global_step == self._loaded and fault(checkpoint) is None:
            return  # no step since: writing it again would put it at risk
        delete(checkpoint)  # what a kill left under its name
        limit, trainer.save_limit = trainer.save_limit, -1
        try:
            super()._save_checkpoint()
        finally:
            trainer.save_limit = limit
        finish(folder, checkpoint)
        remove_obsolete_ckpt(str(folder), self.global_step, self.best_global_step, limit)

    def _make_batch_data(self, metrics: dict[str, Any]) -> DataProto:
        """`data.rollout_batch_size` groups with their rewards. Rounds go on until there are so many.

        Left out are groups without a judge's verdict and, with `algorithm.online_filtering`, those outside of its
        bounds.

        Raises:
            RolloutError: `trainer.max_try_make_batch` rounds did not give enough groups.
        """
        n, wanted = self.config.worker.rollout.n, self.config.data.rollout_batch_size
        most = self.config.trainer.max_try_make_batch
        kept: list[tuple[DataProto, dict[str, list[float]]]] = []  # of each group
        seen: Counter[str] = Counter()
        sampled: list[float] = []  # mean accuracy of every group of the step that has a verdict, kept or not
        rounds = 0
        while len(kept) < wanted:
            if 0 < most <= rounds:
                raise RolloutError(self._filter.starved(len(kept), wanted, rounds, seen))
            rounds += 1
            batch, found = self._sample()
            for start in range(0, len(batch), n):
                columns = {name: values[start : start + n] for name, values in found.items()}
                correct = columns.pop(CORRECT)
                verdict = self._filter.verdict(correct, unjudged=any(columns.pop(DROPPED)))
                seen[verdict] += 1
                if verdict != Verdict.NO_VERDICT:
                    sampled.append(sum(correct) / n)
                if verdict == Verdict.KEPT:
                    kept.append((batch[start : start + n], columns))
        data = DataProto.concat([group for group, _ in kept[:wanted]])
        data.meta_info[STEP] = self.global_step
        for name in kept[0][1]:
            metrics[f"reward/{name}"] = float(np.mean([value for _, found in kept[:wanted] for value in found[name]]))
        metrics |= {f"groups/{name}": seen[name] for name in (Verdict.TOO_EASY, Verdict.TOO_HARD, Verdict.NO_VERDICT)}
        metrics |= {"groups/accuracy": float(np.mean(sampled))}
        metrics |= {"groups/rounds": rounds, "groups/surplus": len(kept) - wanted}
        metrics |= span_metrics(samples_of(data, self.tokenizer, self.tokens), self.tokens)
        return data

    def _sample(self) -> tuple[DataProto, dict[str, list[float]]]:
        """One round: rollouts for the next prompts, group by group, and their rewards."""
        try:
            rows = next(self.data_iterator)
        except StopIteration:
            self.data_iterator = iter(self.train_dataloader)
            rows = next(self.data_iterator)
        batch = DataProto.from_single_dict(rows)
        batch.non_tensor_batch["uid"] = np.array([str(uuid.uuid4()) for _ in range(len(batch))], dtype=object)
        prompts = batch.pop(["input_ids", "attention_mask", "position_ids"], [PROMPT])
        output = self.actor_rollout_ref_wg.generate_sequences(prompts)
        # The prompts' tensors are in the output, which has n rows for each of them.
        repeated = {k: v.repeat(self.config.worker.rollout.n) for k, v in batch.non_tensor_batch.items()}
        output.non_tensor_batch |= repeated
        totals, columns = ray.get(self.reward_fn.compute_reward.remote(output))
        output.batch["token_level_scores"] = totals
        return output, columns


class Runner:
    """Lives in a Ray actor, as EasyR1's own does."""

    def run(self, config: LaDapoConfig) -> None:
        path = config.worker.actor.model.model_path
        processor = get_processor(path, trust_remote_code=config.worker.actor.model.trust_remote_code, use_fast=True)
        if processor is None:
            raise CheckpointError(f"{path}: expected a Qwen3-VL checkpoint, found no processor in it")
        tokenizer = processor.tokenizer
        LatentTokens.from_tokenizer(tokenizer)  # CheckpointError before any worker starts
        train, val = create_dataloaders(config.data, processor, checked_rewards(config.rewards))
        manager = ray.remote(LatentRewardManager).options(num_cpus=config.worker.reward.num_cpus)
        reward_fn = manager.remote(config.rewards, tokenizer)
        pool = {"global_pool": [config.trainer.n_gpus_per_node] * config.trainer.nnodes}
        trainer = LaDapoTrainer(
            config,
            tokenizer=tokenizer,
            processor=processor,
            train_dataloader=train,
            val_dataloader=val,
            role_worker_mapping={Role.ActorRolloutRef: ray.remote(LatentFSDPWorker)},
            resource_pool_manager=ResourcePoolManager(pool, {Role.ActorRolloutRef: "global_pool"}),
            ray_worker_group_cls=RayWorkerGroup,
            reward_fn=reward_fn,
            val_reward_fn=reward_fn,
        )
        for line in check_same_run(config, train.dataset.prompts):
            print(line)
        trainer.init_workers()
        trainer.fit()
