"""Our sections of a verl configuration: `latent`, `rewards` and `groups`, beside verl's own.

    latent:
      policy: {name: vmf, mean_cosine: 0.9}
      tempering: sqrt_dim
    rewards:
      - {term: accuracy, weight: 0.9}
    groups: {low: 0.1, high: 0.9}

Text is clipped, averaged and compared with the reference as verl's own keys say (`actor.clip_ratio_low`,
`clip_ratio_high`, `clip_ratio_c`, `use_kl_loss`, `kl_loss_coef`), and `actor.entropy_coeff` is its entropy bonus. What
latents do not go with, `check_host` refuses; what would have no effect, `unread`.
"""

import difflib
from dataclasses import dataclass

from omegaconf import DictConfig, OmegaConf

from future_l1_plugin.compat import require_attention
from future_l1_plugin.config import from_mapping
from future_l1_plugin.errors import ConfigError
from future_l1_plugin.integrations.rl.settings import LatentSection, checked_rewards
from future_l1_plugin.integrations.verl import names
from future_l1_plugin.integrations.verl.correction import rollout_correction
from future_l1_plugin.integrations.verl.unread import check_given, check_unread
from future_l1_plugin.integrations.vllm.allocator import check_allocator
from future_l1_plugin.la_dapo import LaDapoLoss, RolloutCorrection
from future_l1_plugin.model.training import check_whole
from future_l1_plugin.rewards import RewardSet

#: Top-level keys: verl's own, and ours. verl takes any key, so a misspelt section would be ignored.
_SECTIONS = {
    *("actor_rollout_ref", "algorithm", "critic", "custom_reward_function", "data", "distillation", "global_profiler"),
    *("model_engine", "ray_kwargs", "reward", "reward_model", "sandbox_fusion", "skip", "trainer", "transfer_queue"),
    *("latent", "rewards", "groups", "out"),
}


@dataclass
class GroupsSection:
    """Which groups of rollouts are trained on (with `algorithm.filter_groups.enable`), and when to give up."""

    low: float = 0.1  # least mean accuracy of a group
    high: float = 0.9  # greatest
    refill: float = 1.5  # prompts sampled anew for each one that is missing
    max_rounds: int = 10  # rounds of sampling a step
    max_failed: int = 16  # groups per step, or a batch of a validation, that may fail by their own fault
    stall_s: float | None = 3600.0  # seconds without the end of any rollout before the run stops; None = wait for ever

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high <= 1:
            raise ConfigError(f"groups: expected 0 <= low <= high <= 1, found low {self.low}, high {self.high}")
        if self.refill < 1 or self.max_rounds < 1:
            raise ConfigError(
                f"groups: expected refill >= 1 and max_rounds >= 1, found {self.refill} and {self.max_rounds}"
            )
        if self.max_failed < 0:
            raise ConfigError(f"groups.max_failed: expected 0 (none) or more, found {self.max_failed}")
        if self.stall_s is not None and not self.stall_s > 0:
            raise ConfigError(
                f"groups.stall_s: expected seconds above 0, or null (wait for ever), found {self.stall_s}"
            )


@dataclass(frozen=True)
class Settings:
    """All three sections, checked, and the loss that they make together with verl's keys."""

    latent: LatentSection
    groups: GroupsSection
    rewards: RewardSet
    loss: LaDapoLoss
    correction: RolloutCorrection | None  # of rollouts whose policy is not the actor's; None = off

    @classmethod
    def from_config(cls, config: DictConfig) -> "Settings":
        """Check a whole verl configuration.

        Raises:
            ConfigError: a section is missing or wrong, or verl is set to something that latents do not go with.
            CheckpointError: the model's path is a checkpoint of a run in training; says the command that exports it.
        """
        if "dry_run" in config:  # verl starts Ray before it asks us for anything
            raise ConfigError("dry_run: verl has none. Run: future-l1 plan RECIPE.yaml, with the same key=value words")
        if unknown := sorted(set(config) - _SECTIONS):
            near = difflib.get_close_matches(unknown[0], _SECTIONS, n=1)
            hint = f" Did you mean `{near[0]}`?" if near else ""
            raise ConfigError(f"unknown section `{unknown[0]}`.{hint} Sections: {', '.join(sorted(_SECTIONS))}")
        if "rewards" not in config:
            raise ConfigError("rewards: expected a list of reward terms at the top level, as in recipes/la_dapo.yaml")
        check_given(config)
        check_whole(config.actor_rollout_ref.model.path, "actor_rollout_ref.model.path")
        check_host(config)
        check_unread(config)
        latent, actor = latent_section(config), config.actor_rollout_ref.actor
        return cls(
            latent=latent,
            groups=from_mapping(GroupsSection, config.get("groups", {}), "groups"),
            rewards=reward_set(config),
            correction=rollout_correction(config),
            loss=latent.loss(
                with_kl=actor.use_kl_loss,
                kl_weight=actor.kl_loss_coef,
                clip_low=actor.clip_ratio_low,
                clip_high=actor.clip_ratio_high,
                dual_clip=actor.clip_ratio_c,
                entropy_weight=actor.entropy_coeff,
            ),
        )


def attention(config: DictConfig) -> str:
    """The attention implementation of actor and reference. The default is that of verl's `HFModelConfig`."""
    return config.actor_rollout_ref.model.override_config.get("attn_implementation", "flash_attention_2")


def check_attention(config: DictConfig) -> None:
    """Raises EnvironmentMismatch: this environment lacks what `attention` needs.

    The price of sdpa: transformers tells packed samples apart by their positions and makes a mask of it (padded ones
    have one, too), boolean, and once more in bfloat16 in torch's kernel. And verl takes log-probabilities token by
    token, where flash-attn has a kernel for them.
    """
    tokens = config.actor_rollout_ref.actor.ppo_max_token_len_per_gpu
    mask = f"{attention_mask_bytes(tokens) / 2**30:.2f} GiB for a micro-batch of {tokens:,}"
    require_attention(
        attention(config),
        "++actor_rollout_ref.model.override_config.attn_implementation",
        f"at the price of a mask of tokens x tokens ({mask}), attention over all of its pairs, and log-probabilities "
        "token by token",
    )


def attention_mask_bytes(tokens: int) -> int:
    """Of sdpa for a packed micro-batch; see `check_attention`."""
    return 3 * tokens**2


def latent_section(config: DictConfig) -> LatentSection:
    """The `latent` section. Raises ConfigError."""
    return from_mapping(LatentSection, config.get("latent", {}), "latent")


def reward_set(config: DictConfig) -> RewardSet:
    """The `rewards` section. Raises ConfigError."""
    return checked_rewards(OmegaConf.to_container(config.rewards, resolve=True))


def check_host(config: DictConfig) -> None:
    """Refuse what verl offers and latents do not go with. Raises ConfigError with the key and the value to set."""
    model, actor, rollout = (config.actor_rollout_ref[name] for name in ("model", "actor", "rollout"))
    wrong = [
        (actor.strategy != names.ENGINE, "actor_rollout_ref.actor.strategy", actor.strategy, names.ENGINE),
        (config.trainer.v1.trainer_mode != names.TRAINER, "trainer.v1.trainer_mode", "", names.TRAINER),
        (
            rollout.name not in (names.ROLLOUT, names.VLLM_ROLLOUT),
            "actor_rollout_ref.rollout.name",
            rollout.name,
            f"{names.VLLM_ROLLOUT} or {names.ROLLOUT}",
        ),
        (
            rollout.agent.default_agent_loop != names.AGENT_LOOP,
            "actor_rollout_ref.rollout.agent.default_agent_loop",
            rollout.agent.default_agent_loop,
            names.AGENT_LOOP,
        ),
        (not rollout.calculate_log_probs, "actor_rollout_ref.rollout.calculate_log_probs", False, True),
        (
            actor.loss_agg_mode != "token-mean",
            "actor_rollout_ref.actor.loss_agg_mode",
            actor.loss_agg_mode,
            "token-mean",
        ),
        (
            actor.use_kl_loss and actor.kl_loss_type != "low_var_kl",
            "actor_rollout_ref.actor.kl_loss_type",
            actor.kl_loss_type,
            "low_var_kl",
        ),
        (
            actor.policy_loss.loss_mode != "vanilla",  # the loss is la_dapo's own
            "actor_rollout_ref.actor.policy_loss.loss_mode",
            actor.policy_loss.loss_mode,
            "vanilla",
        ),
        (
            config.trainer.get("critic_warmup", 0) != 0,  # steps without an update, for a critic that is not there
            "trainer.critic_warmup",
            config.trainer.get("critic_warmup", 0),
            0,
        ),
        (
            config.algorithm.filter_groups.enable and config.algorithm.filter_groups.metric != "acc",
            "algorithm.filter_groups.metric",
            config.algorithm.filter_groups.metric,
            "acc (groups are filtered by the share that is right)",
        ),
        (
            config.reward.reward_manager.source != "importlib",  # one of verl's own, which know no terms
            "reward.reward_manager.source",
            config.reward.reward_manager.source,
            "importlib and LatentRewardManager, as in recipes/la_dapo.yaml (your own function is a term of `rewards`)",
        ),
        (config.algorithm.use_kl_in_reward, "algorithm.use_kl_in_reward", True, False),
        (
            actor.ulysses_sequence_parallel_size > 1,  # the hidden states of a latent and of its input sit on two ranks
            "actor_rollout_ref.actor.ulysses_sequence_parallel_size",
            actor.ulysses_sequence_parallel_size,
            1,
        ),
        (model.use_fused_kernels, "actor_rollout_ref.model.use_fused_kernels", True, False),
        (
            _lora(model) and not model.lora.get("merge", False),
            "actor_rollout_ref.model.lora.merge",
            False,
            True,
        ),
    ]
    for is_wrong, key, found, expected in wrong:
        if is_wrong:
            raise ConfigError(f"{key}: latents need {expected}, found {found}")
    if rollout.name == names.VLLM_ROLLOUT:  # whose engines inherit the environment
        check_allocator(rollout.get("enable_sleep_mode", True), "actor_rollout_ref.rollout.enable_sleep_mode")


def _lora(model: DictConfig) -> bool:
    return model.get("lora", {}).get("rank", 0) > 0 or model.get("lora_rank", 0) > 0
