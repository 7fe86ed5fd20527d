"""Where an SFT run trains, transformers.Trainer or Qwen-VL-Series-Finetune: what differs, and what both are told.

Records, dataset, collator, model, loss, logs and the final checkpoint are `run`'s and the same everywhere.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from future_l1_plugin.errors import ConfigError
from future_l1_plugin.integrations.sft.deepspeed import NO_FSDP, join_on_a_cpu
from future_l1_plugin.integrations.sft.recipe import SftRecipe

if TYPE_CHECKING:
    from torch import nn
    from transformers import Trainer, TrainingArguments

    from future_l1_plugin.integrations.sft.memory import Sharding

#: The arguments that recipe keys decide, and which key each of them is. A host takes no second value for them.
RECIPE_KEYS = {
    "output_dir": "output",
    "num_train_epochs": "train.epochs",
    "max_steps": "train.max_steps",
    "per_device_train_batch_size": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.batch_size",
    "learning_rate": "train.learning_rate",
    "lr_scheduler_type": "train.schedule",
    "warmup_steps": "train.warmup_ratio",
    "weight_decay": "train.weight_decay",
    "adam_beta2": "train.beta2",
    "max_grad_norm": "train.max_grad_norm",
    "bf16": "train.precision",
    "gradient_checkpointing": "train.gradient_checkpointing",
    "gradient_checkpointing_kwargs": "train.gradient_checkpointing",
    "logging_steps": "log.every",
    "logging_first_step": "log.every",
    "logging_nan_inf_filter": "log",
    "eval_strategy": "eval.records",
    "eval_steps": "eval.every",
    "per_device_eval_batch_size": "train.micro_batch_size",
    "load_best_model_at_end": "eval.patience",
    "metric_for_best_model": "eval.patience",
    "greater_is_better": "eval.patience",
    "save_strategy": "log.save_every",
    "save_steps": "log.save_every",
    "save_total_limit": "log.keep",
    "report_to": "log.wandb",
    "seed": "train.seed",
    "data_seed": "train.seed",
    "dataloader_num_workers": "data.workers",
    "dataloader_persistent_workers": "data.workers",
    "remove_unused_columns": "data",
    "ddp_find_unused_parameters": "latent",
    "use_cpu": "train.precision",
}


class Host(Protocol):
    """A trainer, its arguments, and how it freezes and adapts a model."""

    #: What a run says first.
    line: str

    def arguments(self, recipe: SftRecipe, checkpoints: Path) -> "TrainingArguments":
        """The recipe in the host's words. Raises ConfigError for what the host or this machine refuse."""
        ...

    def sharding(self) -> "Sharding | None":
        """What is divided over the GPUs; None: each holds everything."""
        ...

    def prepare(self, model: "nn.Module", recipe: SftRecipe, arguments: "TrainingArguments") -> "nn.Module":
        """Freeze what the recipe does not train, and add LoRA if it asks for it. Also works on the meta device."""
        ...

    def trainer(self) -> "type[Trainer]":
        """A trainer class with the losses of `trainer.LatentLosses`."""
        ...


def processes() -> int:
    """Processes of this run: torchrun's count. Read before there are arguments, because DeepSpeed wants it in them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def shared_arguments(recipe: SftRecipe, checkpoints: Path) -> dict[str, Any]:
    """The recipe as keyword arguments of transformers.TrainingArguments, which every host's class is or extends.

    Raises:
        ConfigError: the batch does not divide by the processes.
    """
    import torch

    train, log, cuda = recipe.train, recipe.log, torch.cuda.is_available()
    stops_early = recipe.eval.patience is not None
    return {
        "output_dir": str(checkpoints),
        "num_train_epochs": train.epochs,
        "max_steps": train.max_steps,
        "per_device_train_batch_size": train.micro_batch_size,
        "gradient_accumulation_steps": recipe.accumulation(processes()),
        "learning_rate": train.learning_rate,
        "lr_scheduler_type": train.schedule,
        "warmup_steps": train.warmup_ratio,  # below 1, transformers takes it for a share of the steps
        "weight_decay": train.weight_decay,
        "adam_beta2": train.beta2,
        "max_grad_norm": train.max_grad_norm,
        "bf16": train.precision == "bf16" or (train.precision == "auto" and cuda and torch.cuda.is_bf16_supported()),
        "gradient_checkpointing": train.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if train.gradient_checkpointing else None,
        "logging_steps": log.every,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # it would log a loss that is not finite as 0
        "eval_strategy": "steps" if recipe.eval.records else "no",
        "eval_steps": recipe.eval.every if recipe.eval.records else None,
        "per_device_eval_batch_size": train.micro_batch_size,
        "load_best_model_at_end": stops_early,
        "metric_for_best_model": "eval_loss" if stops_early else None,
        "greater_is_better": False if stops_early else None,
        "save_strategy": "steps" if log.save_every else "no",
        "save_steps": log.save_every or 500,
        "save_total_limit": log.keep,
        "report_to": "wandb" if log.wandb else "none",  # TensorBoard: see run._tensorboard
        "seed": train.seed,
        "data_seed": train.seed,
        "dataloader_num_workers": recipe.data.workers,
        "dataloader_persistent_workers": recipe.data.workers > 0,
        "remove_unused_columns": False,
        # All are used in every pass (`model.objective`). Looking for unused ones, DDP would take a latent head for one,
        # because mu is no output of the model, and then fail at its gradients.
        "ddp_find_unused_parameters": False,
        "use_cpu": not cuda,
    }


def checked(arguments: "TrainingArguments", key: str) -> "TrainingArguments":
    """Raises ConfigError for a machine on which a run would not be what the recipe says."""
    if arguments.n_gpu > 1:  # Trainer would wrap the model in DataParallel, whose replicas no latent reaches
        raise ConfigError(
            f"one process sees {arguments.n_gpu} GPUs. Start one process a GPU (GPUS={arguments.n_gpu} scripts/sft.sh "
            "..), or show it one (CUDA_VISIBLE_DEVICES=0)"
        )
    if arguments.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":  # `accelerate launch` says so
        raise ConfigError(f"FSDP is on: {NO_FSDP.format(key=key)}, started by GPUS=8 scripts/sft.sh")
    if arguments.deepspeed and arguments.use_cpu:
        join_on_a_cpu()
    if arguments.device.type == "cpu":
        # Among several processes accelerate calls it cpu:0, cpu:1, which torch.load takes for unknown devices: no such
        # run could go on from its checkpoint. `device` reads this cached property.
        arguments.__dict__["_setup_devices"] = type(arguments.device)("cpu")
    return arguments
