"""Keys of verl's configuration that nothing here reads, and those that must be given.

verl takes every key of its tree. One that changes nothing is worse than a wrong one: its user believes it holds. So a
value other than verl's own default is refused, with the reason. Keys whose value latents do not go with are in
`settings.check_host`; those of `algorithm.rollout_correction` in `correction`.
"""

import functools
from collections.abc import Iterator, Mapping
from importlib.resources import files
from typing import Any

from omegaconf import DictConfig, OmegaConf

from future_l1_plugin.errors import ConfigError

_SYNC = "training here is synchronous: rollouts and updates take turns"
_OWN_DATA = "LatentRLDataset reads TwiFF, FutureBench and plain files, and never filters, cuts or re-templates prompts"
_GROUPS = "groups are sampled in rounds, which the section `groups` bounds"
_OWN_LOSS = "the loss is la_dapo's own"
_ONE_TURN = "a rollout is one turn, without tools"
_NO_CRITIC = "there is no critic"
_TERMS = "rewards are the terms listed in `rewards`; your own function: {import_path: pkg.mod:name, weight: ..}"
_OLD_TRAINER = "only verl's older trainer (trainer.use_v1=false) reads it"
_ELSEWHERE = "another engine than vLLM reads it"
_NO_KL_REWARD = "KL is in the loss (actor.use_kl_loss, kl_loss_coef), not in the reward"

#: Key or section -> why it has no effect.
UNREAD = {
    "trainer.use_v1": "the older trainer knows no latents",
    "trainer.v1.colocate_async": _SYNC,
    "trainer.v1.separate_async": _SYNC,
    "trainer.v1.sampler.max_off_policy_threshold": _SYNC,
    "trainer.v1.sampler.max_off_policy_strategy": _SYNC,
    "trainer.v1.sampler.sync_refill_failed_groups": f"failed groups are always replaced; {_GROUPS} (groups.max_failed)",
    "trainer.v1.sampler.custom_sampler": _GROUPS,
    "trainer.v1.sampler.sampler_kwargs": _GROUPS,
    "trainer.balance_batch": "batches are always balanced over ranks, groups kept whole",
    "trainer.esi_redundant_time": _OLD_TRAINER,
    "trainer.ray_wait_register_center_timeout": _OLD_TRAINER,
    "trainer.max_critic_ckpt_to_keep": _NO_CRITIC,
    "data.tokenizer": "the checkpoint's own is used (actor_rollout_ref.model.path)",
    "data.trust_remote_code": "files of prompts bring no code",
    "data.use_shm": _OWN_DATA,
    "data.prompt_key": _OWN_DATA,
    "data.reward_fn_key": _TERMS,
    "data.image_key": _OWN_DATA,
    "data.video_key": _OWN_DATA,
    "data.audio_key": _OWN_DATA,
    "data.image_patch_size": "the checkpoint's processor knows it",
    "data.return_raw_input_ids": _OWN_DATA,
    "data.return_raw_chat": _OWN_DATA,
    "data.return_full_prompt": _OWN_DATA,
    "data.return_multi_modal_inputs": _OWN_DATA,
    "data.filter_overlong_prompts": f"{_OWN_DATA}; long ones are found as data are loaded (data.future_l1.on_bad)",
    "data.filter_overlong_prompts_workers": _OWN_DATA,
    "data.truncation": _OWN_DATA,
    "data.apply_chat_template_kwargs": _OWN_DATA,
    "data.mm_processor_kwargs": _OWN_DATA,
    "data.gen_batch_size": f"prompts are asked for one by one; {_GROUPS}",
    "data.tool_config_path": _ONE_TURN,
    "data.function_tool_path": _ONE_TURN,
    "algorithm.filter_groups.max_num_gen_batches": _GROUPS,
    "algorithm.filter_groups.max_inflight_gen_batches": _GROUPS,
    "algorithm.kl_penalty": _NO_KL_REWARD,
    "algorithm.kl_ctrl": _NO_KL_REWARD,
    "algorithm.use_pf_ppo": _OLD_TRAINER,
    "algorithm.pf_ppo": _OLD_TRAINER,
    "reward.custom_reward_function": _TERMS,
    "reward.sandbox_fusion": _TERMS,
    "reward.reward_model": _TERMS,
    "custom_reward_function": _TERMS,
    "sandbox_fusion": _TERMS,
    "reward_model": _TERMS,
    "critic": _NO_CRITIC,
    "distillation": f"{_OWN_LOSS}, without a teacher",
    "actor_rollout_ref.actor.clip_ratio": "set clip_ratio_low and clip_ratio_high",
    "actor_rollout_ref.actor.grad_clip": "set actor.optim.clip_grad",
    "actor_rollout_ref.actor.loss_scale_factor": _OWN_LOSS,
    "actor_rollout_ref.actor.tau_pos": _OWN_LOSS,
    "actor_rollout_ref.actor.tau_neg": _OWN_LOSS,
    "actor_rollout_ref.actor.policy_loss": _OWN_LOSS,
    "actor_rollout_ref.actor.use_prefix_grouper": _OLD_TRAINER,
    "actor_rollout_ref.actor.calculate_sum_pi_squared": _OLD_TRAINER,
    "actor_rollout_ref.rollout.nnodes": _SYNC,
    "actor_rollout_ref.rollout.n_gpus_per_node": _SYNC,
    "actor_rollout_ref.rollout.do_sample": "set rollout.temperature=0 for greedy decoding",
    "actor_rollout_ref.rollout.repetition_penalty": "verl's agent loop sends 1",
    "actor_rollout_ref.rollout.over_sample_rate": _GROUPS,
    "actor_rollout_ref.rollout.multi_stage_wake_up": _ELSEWHERE,
    "actor_rollout_ref.rollout.skip_tokenizer_init": _ELSEWHERE,
    "actor_rollout_ref.rollout.engine_kwargs.sglang": _ELSEWHERE,
    "actor_rollout_ref.rollout.engine_kwargs.trtllm": _ELSEWHERE,
    "actor_rollout_ref.rollout.disaggregation": _ELSEWHERE,
    "actor_rollout_ref.rollout.multi_turn": _ONE_TURN,
    "actor_rollout_ref.rollout.agent.agent_loop_config_path": "there is one agent loop, future_l1_latent",
    "actor_rollout_ref.rollout.agent.custom_async_server": "rollout.name chooses the server",
    "actor_rollout_ref.rollout.trace": "verl's trainer traces no rollout; trainer.rollout_data_dir writes them down",
    "actor_rollout_ref.rollout.enable_rollout_routing_replay": "the model has no experts",
    "actor_rollout_ref.rollout.moe_load_balance_metrics_interval": "the model has no experts",
    "actor_rollout_ref.rollout.expert_parallel_size": "the model has no experts",
}
_VLLM = "latent_hf decodes with transformers; only latent_vllm reads it"
#: The same, where a key has a certain value. What recipes/la_dapo.yaml sets for vLLM may stand beside latent_hf.
UNREAD_WITH = {
    ("algorithm.adv_estimator", "la_dapo"): {
        "algorithm.gamma": "a response has one reward, at its end, for all of its actions",
        "algorithm.lam": "a response has one reward, at its end, for all of its actions",
    },
    ("actor_rollout_ref.rollout.name", "latent_hf"): {
        f"actor_rollout_ref.rollout.{key}": _VLLM
        for key in (
            *("enforce_eager", "cudagraph_capture_sizes", "max_num_batched_tokens", "enable_chunked_prefill"),
            *("enable_prefix_caching", "logprobs_mode", "scheduling_policy", "disable_log_stats", "engine_kwargs.vllm"),
            *("prometheus", "quantization_config_file"),
        )
    },
}
#: Defaults of keys that verl takes and does not list.
_UNLISTED = {"actor_rollout_ref.rollout.repetition_penalty": 1.0}
LOSS_MODE = "actor_rollout_ref.actor.policy_loss.loss_mode"  # `settings.check_host` says what it must be
#: Settings of the dataset alone, which other hosts hand to it, too.
_OF_DATASET = {key.removeprefix("data."): why for key, why in UNREAD.items() if why.startswith(_OWN_DATA)}

#: What no default can stand for, and what to give.
REQUIRED = {
    "actor_rollout_ref.model.path": "the folder of a latent SFT checkpoint",
    "data.train_files": "files of prompts: [rl.json]",
    "data.val_files": "files of prompts: [futurebench.json]",
}


def check_unread(config: DictConfig) -> None:
    """Raises ConfigError: a key that would have no effect differs from verl's default; says why, and the default."""
    table = dict(UNREAD)
    for (key, value), more in UNREAD_WITH.items():
        if OmegaConf.select(config, key) == value:
            table |= more
    given = OmegaConf.to_container(config, resolve=False)
    probe: DictConfig | None = None
    for key, why in table.items():
        for name, default in _differing(key, _at(given, key), _at(_defaults(), key)):
            found = _plain(OmegaConf.select(config, name))
            if isinstance(default, str) and "${" in default:  # refers to other keys, which the user may have set
                probe = OmegaConf.create(given) if probe is None else probe
                OmegaConf.update(probe, name, default, merge=False)
                default = _plain(OmegaConf.select(probe, name))
            off = default is None and found is False  # two words for one thing
            if found != default and not off and name != LOSS_MODE:
                raise ConfigError(
                    f"{name}: {found!r} would have no effect: {why}. Remove the key (verl's default: {default!r})"
                )


def check_dataset_keys(config: Mapping[str, Any]) -> None:
    """The same for the section `data` alone, as a dataset gets it. Raises ConfigError."""
    for key, why in _OF_DATASET.items():
        found = _plain(config.get(key))
        if found is not None and found != _at(_defaults(), f"data.{key}"):  # other hosts have neither key nor defaults
            raise ConfigError(f"data.{key}: {found!r} would have no effect: {why}. Remove the key")


def check_given(config: DictConfig) -> None:
    """Raises ConfigError: a key of REQUIRED holds verl's own default. A recipe's `???` over it is no value to Hydra."""
    for key, what in REQUIRED.items():
        if _plain(OmegaConf.select(config, key)) == _at(_defaults(), key):
            raise ConfigError(f"{key}: must be given: {what}, as {key}=VALUE; found verl's own placeholder")


@functools.cache
def _defaults() -> dict[str, Any]:
    """verl's whole configuration, composed, as it lies in its package (a test compares it with Hydra's)."""
    loaded = OmegaConf.load(str(files("verl") / "trainer" / "config" / "_generated_ppo_trainer.yaml"))
    for key, value in _UNLISTED.items():
        OmegaConf.update(loaded, key, value, force_add=True)
    return OmegaConf.to_container(loaded, resolve=False)


def _at(tree: Any, key: str) -> Any:
    """The value at a dotted key, None where there is none."""
    for name in key.split("."):
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _differing(key: str, found: Any, default: Any) -> Iterator[tuple[str, Any]]:
    """The keys below `key`, or itself, that are not written as in verl's tree, and their defaults.

    What is absent from the user's tree has its default.
    """
    if isinstance(found, dict) and isinstance(default, dict) and default:
        for name in found:
            yield from _differing(f"{key}.{name}", found[name], default.get(name))
    elif found is not None and found != default:
        yield key, default
