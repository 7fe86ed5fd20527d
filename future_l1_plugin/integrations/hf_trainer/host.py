"""transformers.Trainer as the host of an SFT run: one process a device, each with the whole model or its part of it."""

from pathlib import Path
from typing import TYPE_CHECKING

from future_l1_plugin.errors import ConfigError
from future_l1_plugin.integrations.sft.deepspeed import check_startable, configuration
from future_l1_plugin.integrations.sft.host import checked, shared_arguments
from future_l1_plugin.integrations.sft.lora import adapted
from future_l1_plugin.integrations.sft.memory import Sharding
from future_l1_plugin.integrations.sft.recipe import LoraRecipe, SftRecipe
from future_l1_plugin.model.backbone import Backbone, core_of

if TYPE_CHECKING:
    from torch import nn
    from transformers import Trainer, TrainingArguments


class HfTrainer:
    """See `sft.host.Host`.

    Raises:
        ConfigError: `hf_trainer.deepspeed` is no known name and no file.
    """

    def __init__(self, recipe: SftRecipe) -> None:
        from transformers import __version__

        asked = recipe.hf_trainer.deepspeed
        self._deepspeed = configuration(asked, "hf_trainer.deepspeed") if asked else None
        how = f"DeepSpeed {asked}" if asked else "each GPU holds everything"
        self.line = f"SFT on transformers.Trainer {__version__}, {how} (no qwen_vl_finetune.path is given)"

    def arguments(self, recipe: SftRecipe, checkpoints: Path) -> "TrainingArguments":
        from transformers import TrainingArguments

        values = shared_arguments(recipe, checkpoints)
        if recipe.hf_trainer.deepspeed:
            check_startable("hf_trainer.deepspeed")
            values["deepspeed"] = self._deepspeed
        try:
            arguments = TrainingArguments(**values)
        except ValueError as error:
            raise ConfigError(f"train: transformers refuses these settings: {error}") from error
        return checked(arguments, recipe.sharding_key)

    def sharding(self) -> Sharding | None:
        return Sharding.from_config(self._deepspeed) if self._deepspeed else None

    def prepare(self, model: "nn.Module", recipe: SftRecipe, arguments: "TrainingArguments") -> "nn.Module":
        """Vision tower and mergers stay as they are unless asked for; text decoder and lm_head learn (paper)."""
        core_of(model).vision.requires_grad_(recipe.train.train_vision)
        return with_lora(model, recipe.train.lora, arguments) if recipe.train.lora.rank else model

    def trainer(self) -> "type[Trainer]":
        from future_l1_plugin.integrations.hf_trainer.trainer import LatentSftTrainer

        return LatentSftTrainer


def lora_targets(family: Backbone) -> str:
    """PEFT's pattern for the names of the text decoder's linear layers."""
    return rf".*{family.text}\.layers\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def with_lora(model: "nn.Module", lora: LoraRecipe, arguments: "TrainingArguments | None" = None) -> "nn.Module":
    """The model with LoRA on the text decoder; see `sft.lora.adapted` for what is trained beside it."""
    targets = lora_targets(core_of(model).family)
    return adapted(model, arguments, targets=targets, r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout)
