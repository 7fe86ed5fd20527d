"""LoRA on verl with the rows of the latent tokens trained: what verl's keys cannot say is told to PEFT and FSDP2."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.utils.other import set_additional_trainable_modules
from torch import nn

from future_l1_plugin.model.token_rows import trainable_rows


def add_rows(module: Any) -> None:
    """To a PeftModel, PEFT's own adapter of the three rows. An adapter that was loaded may have brought it already."""
    model, config = module.get_base_model(), module.peft_config["default"]
    if config.trainable_token_indices is None:
        targets = [name.split(".")[-1] for name in module.base_model.targeted_module_names]
        config.trainable_token_indices = trainable_rows(model.config, without=targets)
        set_additional_trainable_modules(model, config, module.base_model.get_model_config(model), "default")
    out = getattr(module.get_output_embeddings(), "token_adapter", None)
    if out is not None and out.tied_adapter is not None:
        # The two modules share the rows and their container. A container that is shared is visited once when a state
        # dict is spread over the ranks, and the second name of the rows would be left behind.
        out.trainable_tokens_delta = nn.ParameterDict(dict(out.trainable_tokens_delta.items()))


@contextmanager
def embeddings_in_the_outermost_unit(config: Any) -> Iterator[None]:
    """verl makes untied embeddings units of FSDP2 of their own. The wrapper around their rows and what it wraps would
    both become one, and the wrapper reads its weight without a forward pass, which is what gathers a unit.

    Args:
        config: transformers' of the model; changed within.
    """
    tied, config.tie_word_embeddings = config.tie_word_embeddings, True  # what verl asks
    try:
        yield
    finally:
        config.tie_word_embeddings = tied
