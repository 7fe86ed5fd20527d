"""transformers.Trainer as the host of an SFT run, on one device or with one process a device."""

from pathlib import Path
from typing import TYPE_CHECKING

from future_l1_plugin.errors import ConfigError
from future_l1_plugin.integrations.sft.host import checked, shared_arguments
from future_l1_plugin.integrations.sft.recipe import LoraRecipe, SftRecipe

if TYPE_CHECKING:
    from torch import nn
    from transformers import Trainer, TrainingArguments

#: The text decoder's linear layers.
LORA_TARGETS = r".*language_model\.layers\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


class HfTrainer:
    """See `sft.host.Host`. Each process holds the whole model."""

    def __init__(self, recipe: SftRecipe) -> None:
        from transformers import __version__

        sharding = recipe.qwen_vl_finetune.deepspeed
        unused = f"; qwen_vl_finetune.deepspeed ({sharding}) is not used: each GPU holds everything" if sharding else ""
        self.line = f"SFT on transformers.Trainer {__version__} (no qwen_vl_finetune.path is given{unused})"

    def arguments(self, recipe: SftRecipe, checkpoints: Path) -> "TrainingArguments":
        from transformers import TrainingArguments

        values = shared_arguments(recipe, checkpoints)
        try:
            arguments = TrainingArguments(**values)
        except ValueError as error:
            raise ConfigError(f"train: transformers refuses these settings: {error}") from error
        return checked(arguments)

    def prepare(self, model: "nn.Module", recipe: SftRecipe, arguments: "TrainingArguments") -> "nn.Module":
        """Vision tower and mergers stay as they are unless asked for; text decoder and lm_head learn (paper)."""
        model.model.visual.requires_grad_(recipe.train.train_vision)
        return with_lora(model, recipe.train.lora) if recipe.train.lora.rank else model

    def trainer(self) -> "type[Trainer]":
        from future_l1_plugin.integrations.hf_trainer.trainer import LatentSftTrainer

        return LatentSftTrainer


def with_lora(model: "nn.Module", lora: LoraRecipe) -> "nn.Module":
    """The model with LoRA on the text decoder; a latent head is trained whole."""
    from peft import LoraConfig, get_peft_model

    saved = ["projection_head"] if hasattr(model, "projection_head") else None
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=LORA_TARGETS,
        modules_to_save=saved,
    )
    return get_peft_model(model, config)
