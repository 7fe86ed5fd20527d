"""Run an SFT recipe on transformers.Trainer.

python -m future_l1_plugin.integrations.hf_trainer.run RECIPE [key=value ..]
"""

import argparse
import shutil
import sys
from pathlib import Path

from future_l1_plugin.config import load_recipe, save_recipe
from future_l1_plugin.errors import ConfigError, UserError
from future_l1_plugin.integrations.hf_trainer.recipe import SftRecipe


def run(recipe: SftRecipe) -> Path:
    """Train as the recipe says and return the folder of the final checkpoint (`output/final`).

    Raises ConfigError, CheckpointError or DataError before any training step if something does not fit.
    """
    import torch
    from transformers import set_seed
    from transformers.trainer_utils import get_last_checkpoint

    from future_l1_plugin.data.records import load_records
    from future_l1_plugin.data.sft import SftCollator, SftDataset, check_records
    from future_l1_plugin.integrations.hf_trainer.trainer import JsonlLog, LatentSftTrainer, save_final
    from future_l1_plugin.model import load
    from future_l1_plugin.model.config import LatentConfig
    from future_l1_plugin.model.objective import TEACHER_FORCING, OwnLatents

    # Gradients of a small model in float32 underflow to denormal numbers, on which a CPU is up to ten times slower.
    # Worker threads inherit the setting, so it must come before the first parallel operation.
    torch.set_flush_denormal(True)
    output, train, log = Path(recipe.output), recipe.train, recipe.log
    final, checkpoints = output / "final", output / "checkpoints"
    newest = get_last_checkpoint(str(checkpoints)) if log.resume and checkpoints.exists() else None
    if log.resume and (newest or final.exists()):
        _check_same_run(recipe, output / "recipe.yaml")
    if final.exists() and log.resume:
        print(f"{final} is there already: nothing to do (log.resume=false trains anew)")
        return final
    arguments = _arguments(recipe, checkpoints)
    set_seed(train.seed)
    data = load_records(recipe.data.records, video_root=recipe.data.videos or None, on_bad=recipe.data.on_bad)
    data = check_records(data, on_bad=recipe.data.on_bad)
    for bad in data.bad[:10]:
        print(f"left out: {bad.source} {bad.id}: {bad.reason}", file=sys.stderr)
    if data.bad:
        print(f"left out {len(data.bad)} of {len(data.bad) + len(data)} records", file=sys.stderr)
    latent_keys = {
        "latent_loss": recipe.latent.loss,
        "latent_lambda": recipe.latent.weight,
        "max_latent_token": recipe.latent.max_latent_token,
        "train_fixed_latent_budget": recipe.latent.train_fixed_latent_budget,
    }
    overrides = {key: value for key, value in latent_keys.items() if value is not None}
    model, processor = load(
        recipe.model, dtype=torch.float32, attn_implementation=train.attn_implementation, **overrides
    )
    latent = LatentConfig.from_hf(model.config)
    own = OwnLatents(recipe.latent.own_share, recipe.latent.own_passes, recipe.latent.own_mean_cosine)
    _freeze(model, train.train_vision)
    if train.lora.rank:
        model = _with_lora(model, train.lora)
    if arguments.process_index == 0:
        if not log.resume:  # what an earlier run left would be taken for this one's by the next resume
            shutil.rmtree(checkpoints, ignore_errors=True)
            shutil.rmtree(final, ignore_errors=True)
        save_recipe(recipe, output / "recipe.yaml")
    callbacks = [JsonlLog(output / "metrics.jsonl")]
    if log.tensorboard and arguments.process_index == 0:
        callbacks.append(_tensorboard(output / "tensorboard"))
    trainer = LatentSftTrainer(
        model=model,
        args=arguments,
        latent=latent,
        own=own if recipe.data.spans else TEACHER_FORCING,  # without spans the extra passes would be for nothing
        train_dataset=SftDataset(data, recipe.data.spans, recipe.data.cache_mb * 2**20),
        data_collator=SftCollator(
            processor, latent, recipe.data.question_media, recipe.data.spans, recipe.data.max_length
        ),
        callbacks=callbacks,
    )
    if newest:
        print(f"resuming from {newest}")
    trainer.train(resume_from_checkpoint=newest)
    if trainer.is_world_process_zero():
        save_final(trainer.accelerator.unwrap_model(trainer.model), processor, final)
    return final


def _arguments(recipe: SftRecipe, checkpoints: Path):
    """The recipe in transformers' words. Raises ConfigError for what transformers or this machine refuse."""
    import torch
    from transformers import TrainingArguments

    train, log, cuda = recipe.train, recipe.log, torch.cuda.is_available()
    bf16 = train.precision == "bf16" or (train.precision == "auto" and cuda and torch.cuda.is_bf16_supported())
    try:
        arguments = TrainingArguments(
            output_dir=str(checkpoints),
            num_train_epochs=train.epochs,
            max_steps=train.max_steps,
            per_device_train_batch_size=train.micro_batch_size,
            learning_rate=train.learning_rate,
            lr_scheduler_type=train.schedule,
            warmup_steps=train.warmup_ratio,  # below 1, transformers takes it for a share of the steps
            weight_decay=train.weight_decay,
            adam_beta2=train.beta2,
            max_grad_norm=train.max_grad_norm,
            bf16=bf16,
            gradient_checkpointing=train.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False} if train.gradient_checkpointing else None,
            logging_steps=log.every,
            logging_first_step=True,
            save_strategy="steps" if log.save_every else "no",
            save_steps=log.save_every or 500,
            save_total_limit=log.keep,
            report_to="wandb" if log.wandb else "none",  # TensorBoard: see _tensorboard
            seed=train.seed,
            data_seed=train.seed,
            dataloader_num_workers=recipe.data.workers,
            dataloader_persistent_workers=recipe.data.workers > 0,
            remove_unused_columns=False,
            use_cpu=not cuda,
        )
    except ValueError as error:
        raise ConfigError(f"train: transformers refuses these settings: {error}") from error
    if arguments.n_gpu > 1:  # Trainer would wrap the model in DataParallel, whose replicas no latent reaches
        raise ConfigError(
            f"one process sees {arguments.n_gpu} GPUs. Start one process a GPU (GPUS={arguments.n_gpu} scripts/sft.sh "
            "..), or show it one (CUDA_VISIBLE_DEVICES=0)"
        )
    arguments.gradient_accumulation_steps = recipe.accumulation(arguments.world_size)
    return arguments


def _tensorboard(folder: Path):
    """TensorBoard files in `folder`. report_to="tensorboard" would take the folder from the environment."""
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    return TensorBoardCallback(SummaryWriter(str(folder)))


def _check_same_run(recipe: SftRecipe, saved: Path) -> None:
    """A run may only be resumed, or taken for finished, under the settings it was started with.

    Raises ConfigError that names the settings that differ. What changes no result may: log.*, workers, cache.
    """
    if not saved.exists():
        return
    before = load_recipe(saved, SftRecipe)
    pairs = [("model", before.model, recipe.model)]
    for name in ("data", "latent", "train"):
        old, new = vars(getattr(before, name)), vars(getattr(recipe, name))
        pairs += [(f"{name}.{key}", old[key], new[key]) for key in new if key not in ("workers", "cache_mb")]
    paths = ("model", "data.records", "data.videos")
    changed = [
        f"{key}: {old} -> {new}"
        for key, old, new in pairs
        if old != new and not (key in paths and Path(old).resolve() == Path(new).resolve())
    ]
    if changed:
        raise ConfigError(
            f"{saved.parent} holds a run with other settings ({'; '.join(changed)}). "
            "Name another output, or train anew with log.resume=false."
        )


def _freeze(model, train_vision: bool) -> None:
    """Vision tower and mergers stay as they are unless asked for; text decoder and lm_head learn (paper)."""
    model.model.visual.requires_grad_(train_vision)


def _with_lora(model, lora):
    from peft import LoraConfig, get_peft_model

    names = r".*language_model\.layers\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    saved = ["projection_head"] if hasattr(model, "projection_head") else None
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=names, modules_to_save=saved
    )
    model = get_peft_model(model, config)
    model.print_trainable_parameters()
    return model


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/sft.sh", description="Latent SFT from a recipe.")
    parser.add_argument("recipe", help="a YAML file, e.g. recipes/sft_micro.yaml")
    parser.add_argument("overrides", nargs="*", help="key=value, e.g. train.max_steps=20")
    arguments = parser.parse_args(argv)
    try:
        run(load_recipe(arguments.recipe, SftRecipe, arguments.overrides))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
