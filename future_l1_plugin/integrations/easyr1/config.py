"""EasyR1's configuration with our sections, checked whole before anything is loaded.

    latent: {policy: {name: vmf, mean_cosine: 0.9}, tempering: sqrt_dim}   # `rl.settings.LatentSection`
    rewards: [{term: accuracy, weight: 0.9}, ..]                            # as on verl
    data.future_l1: {video_root: .., question_media: images}               # `PromptSettings`

The rest are EasyR1's own keys. Text is clipped and compared with the reference as `worker.actor` and `algorithm` say;
`algorithm.online_filtering` keeps groups with filter_low <= mean accuracy <= filter_high, its `filter_key` is unused.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from verl.trainer.config import DataConfig, PPOConfig
from verl.workers.config import RolloutConfig, WorkerConfig

from future_l1_plugin.config import load_recipe
from future_l1_plugin.errors import ConfigError
from future_l1_plugin.integrations.rl.settings import LatentSection, checked_rewards
from future_l1_plugin.integrations.verl.dataset import PromptSettings

ROLLOUT = "latent_hf"
#: In `meta_info` of prompts: these are for validation.
VALIDATE = "validate"

#: Settings of EasyR1's own dataset, which would change what is asked and seen. Ours has no use for them.
_EASYR1S_OWN = (
    *("prompt_key", "answer_key", "image_key", "video_key", "image_dir", "video_fps", "min_pixels", "max_pixels"),
    *("format_prompt", "override_chat_template", "filter_overlong_prompts"),
)


@dataclass
class LatentDataConfig(DataConfig):
    train_files: Any = ""  # one file or a list
    val_files: Any = ""
    filter_overlong_prompts: bool = False
    num_workers: int = 8  # processes that encode prompts
    future_l1: PromptSettings = field(default_factory=PromptSettings)


@dataclass
class LatentRolloutConfig(RolloutConfig):
    name: str = ROLLOUT
    tensor_parallel_size: int = 1
    batch_size: int = 64  # responses decoded together on each GPU


@dataclass
class LatentWorkerConfig(WorkerConfig):
    rollout: LatentRolloutConfig = field(default_factory=LatentRolloutConfig)
    latent: LatentSection = field(default_factory=LatentSection)  # filled from the top-level section


@dataclass
class LaDapoConfig(PPOConfig):
    """The whole configuration. `deep_post_init` raises ConfigError for what latents do not go with."""

    data: LatentDataConfig = field(default_factory=LatentDataConfig)
    worker: LatentWorkerConfig = field(default_factory=LatentWorkerConfig)
    latent: LatentSection = field(default_factory=LatentSection)
    rewards: list[dict[str, Any]] = field(default_factory=list)

    def post_init(self) -> None:
        super().post_init()
        if self.worker.latent != LatentSection():
            raise ConfigError("worker.latent: the section `latent` at the top fills it. Move its keys there")
        self.worker.latent = self.latent  # EasyR1 sends its workers nothing else
        self.worker.rollout.val_override_config[VALIDATE] = True
        checked_rewards(self.rewards)
        _check(self)


def load_config(arguments: Sequence[str]) -> LaDapoConfig:
    """`config=FILE` and `key=value` overrides, as EasyR1 takes them; the file may name its parent under `defaults`.

    Raises:
        ConfigError: as `load_recipe`, and see `LaDapoConfig`.
    """
    files = [argument.removeprefix("config=") for argument in arguments if argument.startswith("config=")]
    if len(files) != 1:
        raise ConfigError(f"expected config=FILE once, found it {len(files)} times. Try recipes/easyr1/la_dapo.yaml")
    config = load_recipe(files[0], LaDapoConfig, [a for a in arguments if not a.startswith("config=")])
    config.deep_post_init()
    return config


def _check(config: LaDapoConfig) -> None:
    actor, rollout, algorithm = config.worker.actor, config.worker.rollout, config.algorithm
    plain, lora = LatentDataConfig(), actor.model.lora
    wrong = [
        (algorithm.adv_estimator != "grpo", "algorithm.adv_estimator", algorithm.adv_estimator, "grpo"),
        (not (algorithm.use_kl_loss or algorithm.disable_kl), "algorithm.use_kl_loss", False, "it, or disable_kl,"),
        (
            algorithm.use_kl_loss and algorithm.kl_penalty != "low_var_kl",
            "algorithm.kl_penalty",
            algorithm.kl_penalty,
            "low_var_kl",
        ),
        (actor.loss_avg_mode != "token", "worker.actor.loss_avg_mode", actor.loss_avg_mode, "token"),
        (actor.loss_type != "default", "worker.actor.loss_type", actor.loss_type, "default"),
        # With more, the hidden states of a latent and of its input would sit on two ranks.
        (actor.ulysses_size != 1, "worker.actor.ulysses_size", actor.ulysses_size, 1),
        (
            lora.rank > 0 and lora.target_modules == "all-linear",
            "worker.actor.model.lora.target_modules",
            lora.target_modules,
            "names of the text decoder's layers, such as q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
        ),
        # With LoRA the reference is the actor without its adapters: EasyR1 would move it away and not bring it back.
        (
            lora.rank > 0 and config.worker.ref.offload.offload_params and not actor.offload.offload_params,
            "worker.ref.offload.offload_params",
            True,
            "false under LoRA, or worker.actor.offload.offload_params=true as well",
        ),
        (rollout.name != ROLLOUT, "worker.rollout.name", rollout.name, ROLLOUT),
        (rollout.tensor_parallel_size != 1, "worker.rollout.tensor_parallel_size", rollout.tensor_parallel_size, 1),
        (rollout.ignore_eos, "worker.rollout.ignore_eos", True, False),
        (
            config.worker.reward.reward_function is not None,
            "worker.reward.reward_function",
            config.worker.reward.reward_function,
            "null and the list `rewards`",
        ),
        *(
            (getattr(config.data, key) != getattr(plain, key), f"data.{key}", getattr(config.data, key), "none of it")
            for key in _EASYR1S_OWN
        ),
    ]
    for is_wrong, key, found, expected in wrong:
        if is_wrong:
            raise ConfigError(f"{key}: latents need {expected}, found {found}")
