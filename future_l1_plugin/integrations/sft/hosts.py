"""Which host an SFT recipe trains in."""

from future_l1_plugin.integrations.sft.host import Host
from future_l1_plugin.integrations.sft.recipe import SftRecipe


def host_of(recipe: SftRecipe) -> Host:
    """The one place that decides where a recipe trains.

    Raises:
        ConfigError, EnvironmentMismatch: the recipe names a checkout of Qwen-VL-Series-Finetune that cannot be used.
    """
    if recipe.qwen_vl_finetune.path:
        from future_l1_plugin.integrations.qwen_vl_finetune.host import QwenVlFinetune

        return QwenVlFinetune(recipe)
    from future_l1_plugin.integrations.hf_trainer.host import HfTrainer

    return HfTrainer(recipe)
