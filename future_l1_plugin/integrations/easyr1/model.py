"""A family's model in transformers 4.57 that reads our checkpoints and decodes latents.

`register()` makes it the class that `AutoModelForImageTextToText` builds for the family, which is how EasyR1 loads its
models. It differs from transformers' class in three things that transformers 5 does otherwise.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor
from transformers import AutoModelForImageTextToText

from future_l1_plugin.model.backbone import BACKBONES, Backbone
from future_l1_plugin.model.checkpoint import attach_head, load_head
from future_l1_plugin.model.config import LatentConfig

#: Those that EasyR1 trains.
FAMILIES = tuple(family for family in BACKBONES.values() if family.easyr1_positions is not None)


class LatentModel:
    """What stands before transformers' class of a family; see the module.

    Raises CheckpointError: a checkpoint without latent tokens or without its head's weights.
    """

    def __init__(self, config: Any) -> None:
        text = config.text_config
        if text.rope_scaling is None:  # written by transformers 5, under another name
            text.rope_scaling = {k: v for k, v in text.rope_parameters.items() if k != "rope_theta"}
            text.rope_theta = text.rope_parameters["rope_theta"]
        super().__init__(config)
        attach_head(self, LatentConfig.from_hf(config))

    @classmethod
    def from_pretrained(cls, path: str, *args: Any, **kwargs: Any) -> "LatentModel":
        model = super().from_pretrained(path, *args, **kwargs)
        if LatentConfig.from_hf(model.config).head != "none":
            load_head(model, path)  # under whichever prefix the checkpoint has them
        return model

    # `model.decode` is written for the generation loop of transformers 5.

    def generate(self, *args: Any, custom_generate: Callable[..., Tensor], **kwargs: Any) -> Tensor:
        def loop(model: Any, input_ids: Tensor, **more: Any) -> Tensor:
            more = self._get_initial_cache_position(input_ids.shape[1], input_ids.device, more)
            return custom_generate(model, input_ids, **more)

        return super().generate(*args, custom_generate=loop, **kwargs)

    def prepare_inputs_for_generation(
        self, *args: Any, is_first_iteration: bool = False, next_sequence_length: int | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """transformers 4 tells both from the cache's positions."""
        return super().prepare_inputs_for_generation(*args, **kwargs)


@cache
def latent_class(family: Backbone) -> type[LatentModel]:
    """transformers' class of the family with `LatentModel` before it."""
    return type(f"Latent{family.name.replace('-', '')}", (LatentModel, family.model.load()), {"__module__": __name__})


def register() -> None:
    """For this process."""
    for family in FAMILIES:
        AutoModelForImageTextToText.register(family.config.load(), latent_class(family), exist_ok=True)
