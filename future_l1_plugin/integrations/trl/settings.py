"""Which settings of `GRPOConfig` go with latents, and the loss that they make."""

from dataclasses import fields

from transformers import TrainingArguments
from trl import GRPOConfig

from future_l1_plugin.errors import ConfigError
from future_l1_plugin.integrations.rl.settings import LatentSection
from future_l1_plugin.la_dapo import LaDapoLoss

#: GRPO's own keys that act here. The others steer what LA-DAPO replaces: they keep their defaults.
ACT = {
    *("num_generations", "max_completion_length", "temperature", "top_p", "top_k"),  # rollouts
    *("shuffle_dataset", "generation_batch_size", "steps_per_generation", "num_iterations"),  # batches
    *("epsilon", "epsilon_high", "delta", "beta", "scale_rewards", "disable_dropout"),  # loss
    *("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"),  # reference
    *("log_completions", "num_completions_to_print", "log_unique_prompts", "log_completions_hub_repo"),
}


def loss_settings(args: GRPOConfig, latent: LatentSection) -> LaDapoLoss:
    """The loss that TRL's keys and ours make together.

    Raises:
        ConfigError: a setting that has no effect here, or that latents do not go with.
    """
    shared = {one.name for one in fields(TrainingArguments)}
    for one in fields(GRPOConfig):
        found, default = getattr(args, one.name), None if one.default == "auto" else one.default
        if one.name not in shared | ACT and found != default:
            raise ConfigError(
                f"GRPOConfig.{one.name}: {found!r} would have no effect with LA-DAPO. Leave it out (its default is "
                f"{default!r}). GRPO's keys that act: {', '.join(sorted(ACT))}"
            )
    whole, updates = args.per_device_train_batch_size * args.steps_per_generation, args.gradient_accumulation_steps
    wrong = (
        (args.use_liger_kernel, "use_liger_kernel", True, "false: latents enter through stock modules"),
        (args.eval_strategy != "no", "eval_strategy", args.eval_strategy, "no: evaluate checkpoints with lmms-eval"),
        (args.deepspeed, "deepspeed", args.deepspeed, "none: each device decodes with the whole model"),
        (args.fsdp, "fsdp", args.fsdp, "none: each device decodes with the whole model"),
        (args.torch_compile, "torch_compile", True, "false: hooks read and write hidden states"),
        (args.neftune_noise_alpha, "neftune_noise_alpha", args.neftune_noise_alpha, "none: no noise but the policy's"),
        (args.temperature <= 0, "temperature", args.temperature, "a number above 0"),
        (args.scale_rewards == "batch", "scale_rewards", "batch", "group or none"),
        (
            whole % args.num_generations,
            "num_generations",
            args.num_generations,
            f"a divisor of {whole}, the responses of a process (per_device_train_batch_size * steps_per_generation): "
            "rewards compare those of a whole group",
        ),
        (
            args.steps_per_generation % updates,
            "steps_per_generation",
            args.steps_per_generation,
            f"a multiple of gradient_accumulation_steps, {updates}: the loss is a mean over the actions of an update",
        ),
    )
    for is_wrong, key, found, expected in wrong:
        if is_wrong:
            raise ConfigError(f"GRPOConfig.{key}: latents need {expected}; found {found}")
    if latent.kl_weight and not args.beta:
        raise ConfigError(
            f"latent.kl_weight: {latent.kl_weight}, but TRL keeps a reference only for a GRPOConfig.beta above 0. Set "
            "beta (paper: 1e-2), or latent.kl_weight=0"
        )
    if latent.val_policy != LatentSection().val_policy:
        raise ConfigError("latent.val_policy: has no effect on TRL, where nothing is validated. Leave it out")
    return latent.loss(
        with_kl=bool(args.beta),
        kl_weight=args.beta,
        clip_low=args.epsilon,
        clip_high=args.epsilon if args.epsilon_high is None else args.epsilon_high,
        dual_clip=args.delta,
    )
