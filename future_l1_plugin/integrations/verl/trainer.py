"""`trainer.v1.trainer_mode: la_dapo`: verl's synchronous trainer with LA-DAPO's rewards, loss and metrics.

What is overridden are verl's hooks where there are any, and its private steps `_compute_old_log_prob`,
`_compute_ref_log_prob`, `_compute_advantage` where there are none (verl is pinned; a test watches their signatures).
"""

import logging
import math
from collections import Counter
from pathlib import Path
from typing import Any

import ray
import transfer_queue as tq
from omegaconf import DictConfig, open_dict
from tensordict import NonTensorData, NonTensorStack, TensorDict
from torch import Tensor

from future_l1_plugin.compat import require
from future_l1_plugin.data.prompt import RlPrompt
from future_l1_plugin.errors import CheckpointError, ConfigError
from future_l1_plugin.integrations.rl.groups import NotFinite
from future_l1_plugin.integrations.rl.metrics import angle_gaps, engine_metrics, log_prob_gaps, span_metrics
from future_l1_plugin.integrations.rl.samples import group_rewards, make_sample
from future_l1_plugin.integrations.verl import advantage  # noqa: F401 (registers itself, also if this module comes first)
from future_l1_plugin.integrations.verl.checkpoints import Checkpoints, kept, nothing_removed
from future_l1_plugin.integrations.verl.columns import (
    ANGLE,
    ENGINE_NUMBER,
    OF_ACTIONS,
    OF_ROLLOUT,
    PROMPT,
    RETURN_ANGLE,
    RETURN_MU,
    WEIGHTS,
    from_columns,
    nested,
    objects,
    rows,
)
from future_l1_plugin.integrations.verl.correction import weights_of
from future_l1_plugin.integrations.verl.dataset import even_out
from future_l1_plugin.integrations.verl.dumps import LENGTHS, TEXT, is_told, with_markers
from future_l1_plugin.integrations.verl.groups import GroupBuffer, rank_metrics, whole_groups
from future_l1_plugin.integrations.verl.host import PPOTrainerSync, Role, register_trainer
from future_l1_plugin.integrations.verl.loss import loss_function
from future_l1_plugin.integrations.verl.names import ROLLOUT, TRAINER, VLLM_ROLLOUT
from future_l1_plugin.integrations.verl.pixels import keeper
from future_l1_plugin.integrations.verl.resume import check_same_run, logged_before, put_back
from future_l1_plugin.integrations.verl.reward import last_token
from future_l1_plugin.integrations.verl.settings import Settings, check_attention
from future_l1_plugin.integrations.verl.watch import GO_ON, Watch, agent_loop_worker
from future_l1_plugin.integrations.verl.waves import WaveClient
from future_l1_plugin.integrations.verl.worker import LatentWorker
from future_l1_plugin.latent import LatentTokens
from future_l1_plugin.resume import MARKER, fault

logger = logging.getLogger(__name__)

#: Of verl's figures of an update: what is not finite when a gradient was not.
_FINITE = ("actor/loss", "actor/grad_norm")


@register_trainer(TRAINER)
class LaDapoTrainer(PPOTrainerSync):
    """See the module."""

    def __init__(self, config: DictConfig) -> None:
        self.settings = Settings.from_config(config)
        if config.actor_rollout_ref.rollout.name == VLLM_ROLLOUT:
            require("vllm")  # before any worker starts
        check_attention(config)
        with open_dict(config):
            config.data.gen_batch_size = 1  # so that any number of prompts can be asked for anew
        super().__init__(config)
        self._submitted = (0, 0)  # step, prompts of it
        self._logged = b""
        self._said: dict[str, dict[str, Any]] = {}  # of the rollouts that are written down

    @property
    def trainer_mode(self) -> str:
        """verl takes every mode but "sync" for an asynchronous one."""
        return "sync"

    @trainer_mode.setter
    def trainer_mode(self, value: str) -> None:
        """verl sets the name under which this class is registered."""

    def _init_tokenizer(self) -> None:
        super()._init_tokenizer()
        self.tokens = LatentTokens.from_tokenizer(self.tokenizer)  # CheckpointError before any worker starts

    def _init_dataloader(self) -> None:
        super()._init_dataloader()
        even_out(self.val_dataloader)
        found, wanted = len(self.train_dataset), self.config.data.train_batch_size
        if found < wanted:  # verl would validate first, and then divide by the steps of an epoch
            raise ConfigError(
                f"data.train_batch_size: a step takes {wanted} different prompts, data.train_files hold {found} that "
                f"can be used. Add prompts, or lower it (and actor_rollout_ref.actor.ppo_mini_batch_size) to {found}"
            )

    def _build_replay_buffer(self) -> GroupBuffer:
        sampler = self.config.trainer.v1.sampler
        return GroupBuffer(
            groups=self.settings.groups,
            filtered=self.config.algorithm.filter_groups.enable,
            trainer_mode="sync",
            trainer_config=self.config.trainer.v1.get("sync", {}),
            max_off_policy_threshold=sampler.max_off_policy_threshold,
            max_off_policy_strategy=sampler.max_off_policy_strategy,
            sampler_kwargs=sampler.sampler_kwargs,
            refill_fn=self._add_prompts_to_generate,
            on_clear=lambda uids: ray.get(self._pixels.drop.remote(sorted(uids))),
        )

    def _load_checkpoint(self) -> None:
        """The newest whole checkpoint, whatever verl's tracker file names; or the one that the user named.

        Raises CheckpointError: that one is not whole. ConfigError: see `check_same_run`.
        """
        trainer = self.config.trainer
        folder = Path(trainer.default_local_dir).absolute()
        self._checkpoints = Checkpoints(folder, logger.warning)
        if trainer.resume_mode == "auto":
            self._checkpoints.settle()
        elif trainer.resume_mode == "resume_path":
            named = Path(str(trainer.resume_from_path)).absolute()
            if (named / MARKER).exists() and (reason := fault(named)):
                raise CheckpointError(f"trainer.resume_from_path: {named}: {reason}. Name another checkpoint")
        check_same_run(self.config, self.train_dataset.prompts)
        super()._load_checkpoint()
        if trainer.resume_mode != "auto":
            own = trainer.resume_mode == "resume_path" and named.parent == folder
            self._checkpoints.begin(self.global_steps if own else 0)

    def _save_checkpoint(self) -> None:
        """verl's; what is too old goes when the new one is whole, of this start and of the run's earlier ones."""
        self._checkpoints.make_way(self.global_steps)
        with nothing_removed(self.config.trainer):
            super()._save_checkpoint()
        self._checkpoints.retain(self.global_steps, kept(self.config.trainer))

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        for role in (Role.ActorRollout, Role.ActorRolloutRef):
            if role in self.role_worker_mapping:
                self.role_worker_mapping[role] = ray.remote(LatentWorker)

    def on_init_end(self) -> None:
        self._pixels = keeper()  # before any agent loop asks for it: it ends with who made it
        corrected = self.settings.correction is not None
        scoring = self.settings.latent.scoring()
        self.actor_rollout_wg.set_scoring(scoring)
        self.actor_rollout_wg.set_loss_fn(loss_function(self.settings.loss, scoring, self.tokens.latent, corrected))
        super().on_init_end()

    def get_llm_client(self) -> Any:
        """verl's; `latent_hf` decodes in waves, each on the server that it names."""
        manager = self.llm_server_manager
        if self.config.actor_rollout_ref.rollout.name != ROLLOUT:
            return super().get_llm_client()
        servers = dict(zip(manager.server_addresses, manager.server_handles, strict=True))
        return manager.get_client(WaveClient, servers=servers)

    def fit(self, agent_loop_manager: Any) -> None:
        # verl's file logger empties its file at each start.
        self._logged = logged_before(self.config, self.global_steps)
        self._asked = agent_loop_manager.asked
        servers = [one for replica in self.llm_server_manager.get_replicas() for one in replica.servers]
        self.replay_buffer.watch = Watch(
            {agent_loop_worker(i): one for i, one in enumerate(agent_loop_manager.agent_loop_workers)}
            | {f"rollout server {i}": one for i, one in enumerate(servers)}
            | {f"reward worker {i}": one for i, one in enumerate(self.get_reward_handles() or ())}
            | {"the keeper of pixels": self._pixels},
            self._asked,
        )
        super().fit(agent_loop_manager)

    def on_train_begin(self) -> None:
        super().on_train_begin()
        put_back(self.logger, self._logged)

    def _val_metrics_update(self, data_sources: list[str], sample_uids: list[str], *args: Any, **kwargs: Any) -> dict:
        """Adds `val-aux/SOURCE/questions`, from which a standard error follows, and `val-aux/failed`.

        verl counts a question that failed as wrong in `acc`, and leaves it out of `acc_success_only`.
        """
        metrics = super()._val_metrics_update(data_sources, sample_uids, *args, **kwargs)
        metrics = {name: value for name, value in metrics.items() if is_told(name)}
        answered = set(zip(data_sources, sample_uids, strict=True))
        asked = set(kwargs.get("expected_acc_counts") or answered)
        questions = Counter(source for source, _ in asked)
        metrics |= {f"val-aux/{source}/questions": count for source, count in questions.items()}
        return metrics | {"val-aux/failed": len(asked) - len(answered)}

    def _log_rollout_data(self, batch: Any, timing_raw: dict[str, Any], rollout_data_dir: str) -> None:
        """verl's, with the text and the lengths that the reward workers left beside each rollout's scores."""
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=["extra_fields"])
        infos = [extra["reward_extra_info"] for extra in objects(data["extra_fields"])]
        self._said = dict(zip(batch.keys, infos, strict=True))
        super()._log_rollout_data(batch, timing_raw, rollout_data_dir)
        self._said = {}

    def _dump_generations(
        self, inputs: Any, outputs: Any, gts: Any, scores: Any, reward_extra_infos_dict: dict[str, Any], dump_path: Any
    ) -> None:
        columns = dict(reward_extra_infos_dict)  # of a validation with all that the reward workers said
        if self._said:
            columns |= {name: [self._said[key].get(name) for key in columns["uid"]] for name in (TEXT, *LENGTHS)}
        outputs, columns = with_markers(outputs, columns)
        super()._dump_generations(inputs, outputs, gts, scores, columns, dump_path)

    def _fetch_one_gen_batch(self) -> TensorDict:
        """Names prompts by step and order, so that groups have the same names and order in every run."""
        batch = super()._fetch_one_gen_batch()
        step, count = self._submitted
        count = count if step == self.global_steps else 0
        names = [f"{self.global_steps:06d}x{count + i:06d}" for i in range(len(batch))]
        self._submitted = (self.global_steps, count + len(batch))
        batch["uid"] = NonTensorStack(*(NonTensorData(name) for name in names))
        return batch

    def _balance_batch(self, batch: Any, metrics: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """verl's, and where groups can be dealt out whole, a rank gets them whole: it reads their pixels once."""
        batch = super()._balance_batch(batch, metrics, *args, **kwargs)
        ranks = max(self.actor_rollout_wg._dispatch_info["actor"]) + 1
        order = whole_groups(batch.keys, [tag["seq_len"] for tag in batch.tags], ranks)
        if order is not None:
            batch.reorder(order)
        metrics.update(rank_metrics(batch.keys, [tag["seq_len"] for tag in batch.tags], ranks))
        return batch

    def _compute_old_log_prob(self, batch: Any, metrics: dict[str, Any]) -> Any:
        batch.extra_info |= {RETURN_MU: False, RETURN_ANGLE: True}
        batch = super()._compute_old_log_prob(batch, metrics)
        for key in [key for key in metrics if key.startswith("training/rollout_")]:
            del metrics[key]  # verl's take a density for a probability; ours keep text and latents apart
        data = _columns(batch, *OF_ACTIONS, "old_log_probs", ANGLE)
        metrics.update(log_prob_gaps(from_columns(data, with_latents=False), rows(data["old_log_probs"]), self.tokens))
        metrics.update(angle_gaps(rows(data[ANGLE])))
        return batch

    def _compute_ref_log_prob(self, batch: Any, metrics: dict[str, Any]) -> Any:
        batch.extra_info |= {RETURN_MU: bool(self.settings.loss.latent_kl_weight), RETURN_ANGLE: False}
        return super()._compute_ref_log_prob(batch, metrics)

    def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
        self._add_group_rewards(batch, metrics)
        batch = super()._compute_advantage(batch, metrics)
        self._correct(batch, metrics)
        return batch

    def _correct(self, batch: Any, metrics: dict[str, Any]) -> None:
        """Put our importance weights in the place of verl's, which take a density for a probability."""
        for key in [key for key in metrics if key.startswith("rollout_corr/")]:
            del metrics[key]
        if self.settings.correction is None:
            return
        data = _columns(batch, *OF_ACTIONS, "old_log_probs")
        actor = rows(data["old_log_probs"])
        weights, found = weights_of(
            self.settings.correction, from_columns(data, with_latents=False), actor, self.tokens
        )
        _put(batch, WEIGHTS, weights)
        metrics.update(found)

    def _update_actor(self, batch: Any, metrics: dict[str, Any]) -> Any:
        batch.extra_info |= {RETURN_MU: False, RETURN_ANGLE: False}
        batch = super()._update_actor(batch, metrics)
        self._check_finite(batch, metrics)
        metrics.update(ray.get(self._pixels.clear.remote()))  # no pass over them is left in this step
        return batch

    def _check_finite(self, batch: Any, metrics: dict[str, Any]) -> None:
        """Stop before weights are saved or sent, where verl skips the update with a line in a worker's log.

        The figures are means over the ranks and the updates of the step, so one that is not finite shows.

        Raises NotFinite.
        """
        if all(math.isfinite(metrics[name]) for name in _FINITE):
            return
        uids = dict.fromkeys(key.split("_")[0] for key in batch.keys)
        prompts = [self._asked[uid].prompt_id for uid in uids if uid in self._asked]
        figures = ", ".join(f"{name} {metrics[name]}" for name in _FINITE)
        raise NotFinite(
            f"step {self.global_steps}: a loss or a gradient is not finite ({figures}; means over the updates of the "
            f"step). Nothing of this step was saved or sent to the rollout. Its prompts: {', '.join(prompts)}. {GO_ON} "
            "If it ends here again, go on with another learning rate, attention kernel or data: "
            "trainer.resume_mode=resume_path trainer.resume_from_path=CHECKPOINT and a trainer.project_name of its own"
        )

    def _add_group_rewards(self, batch: Any, metrics: dict[str, Any]) -> None:
        """Replace each trajectory's own reward by its total, now that the whole group is here."""
        data = _columns(batch, *OF_ROLLOUT, PROMPT, "extra_fields", "uid")
        rollouts = from_columns(data)
        prompts, extra, uids = (objects(data[name]) for name in (PROMPT, "extra_fields", "uid"))
        real = [i for i, tag in enumerate(batch.tags) if not tag.get("is_padding", False)]
        longest = self.config.data.max_response_length
        samples = [
            make_sample(self.tokenizer, self.tokens, RlPrompt.from_dict(prompts[i]), rollouts[i], longest) for i in real
        ]
        names = self.settings.rewards.sample_names
        scores = [{name: extra[i]["reward_extra_info"][name] for name in names} for i in real]
        found = group_rewards(self.settings.rewards, samples, scores, [uids[i] for i in real])
        totals = dict(zip(real, found.totals, strict=True))
        _put(batch, "rm_scores", [last_token(totals.get(i, 0.0), len(r.ids)) for i, r in enumerate(rollouts)])
        metrics.update(self.settings.rewards.metrics(samples, found.totals, found.terms))
        metrics.update(span_metrics(samples, self.tokens))
        metrics.update(engine_metrics([uids[i] for i in real], [extra[i][ENGINE_NUMBER] for i in real]))


def _columns(batch: Any, *names: str) -> TensorDict:
    return tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=list(names))


def _put(batch: Any, name: str, values: list[Tensor]) -> None:
    fields = TensorDict({name: nested(values)}, batch_size=len(batch.keys))
    tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=fields)
