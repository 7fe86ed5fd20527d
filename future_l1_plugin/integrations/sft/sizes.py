"""How large an SFT recipe's model is: counted on the meta device, from the checkpoint's config.json alone."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from future_l1_plugin.errors import CheckpointError
from future_l1_plugin.integrations.sft.host import Host
from future_l1_plugin.integrations.sft.memory import Sizes, with_four_bits
from future_l1_plugin.integrations.sft.recipe import SftRecipe

if TYPE_CHECKING:
    from transformers import TrainingArguments

_HOSTS = ("hf_trainer", "qwen_vl_finetune")


def model_sizes(recipe: SftRecipe, host: Host, arguments: "TrainingArguments | None" = None) -> Sizes:
    """Sizes of the recipe's model, frozen and adapted as its host would.

    Args:
        arguments: the host's, where there are some.

    Raises CheckpointError: the configuration can be had neither here nor from the hub, or is of another family.
    """
    import torch

    from future_l1_plugin.model.backbone import by_config
    from future_l1_plugin.model.checkpoint import attach_head
    from future_l1_plugin.model.config import LatentConfig

    config = _config(recipe.model)
    family = by_config(config, recipe.model)
    latent = LatentConfig.from_hf(config)
    if arguments is None:
        arguments = host.arguments(_unsharded(recipe), Path(recipe.output) / "checkpoints")
    with torch.device("meta"):
        model = family.model.load()(config)
        attach_head(model, latent)
        model = host.prepare(model, recipe, arguments)
    own = [sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules()]
    text = config.text_config
    sizes = Sizes(
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        frozen=sum(p.numel() for p in model.parameters() if not p.requires_grad),
        largest=max(own),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        inner=text.intermediate_size,
        queries=text.num_attention_heads * text.head_dim,
        keys=text.num_key_value_heads * text.head_dim,
        vocabulary=text.vocab_size,
        tied=config.tie_word_embeddings,
        rows=any("trainable_tokens_delta" in name for name, _ in model.named_parameters()),
    )
    return with_four_bits(sizes) if recipe.train.lora.bits else sizes


def _config(path: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        said = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{path}: no such folder here, and the hub did not give it ({said})") from error


def _unsharded(recipe: SftRecipe) -> SftRecipe:
    """Arguments under DeepSpeed would start its communication, for which a dry run has no partners."""
    sections = {name: dataclasses.replace(getattr(recipe, name), deepspeed=None) for name in _HOSTS}
    return dataclasses.replace(recipe, **sections)
