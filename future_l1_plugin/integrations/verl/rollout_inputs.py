"""A request to the rollout server, as the model takes it."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from future_l1_plugin.errors import ConfigError
from future_l1_plugin.integrations.verl.pixels import opened
from future_l1_plugin.model.backbone import MEDIA, MEDIA_KEYS, by_config, patches_per_token, token_types


def model_inputs(
    config: Any, prompt_ids: Iterable[int], mm_inputs: dict[str, Any] | None, request_id: str
) -> dict[str, Tensor]:
    """What `left_padded` takes, checked: a mismatch within a batch could otherwise go unnoticed.

    Args:
        config: of the model. prompt_ids: every image and video placeholder written out.
        mm_inputs: the processor's output for this very prompt, or its name (`pixels`).

    Raises:
        ConfigError: no ids; placeholders, pixels and grids that do not agree; what the model does not take.
    """
    ids = torch.tensor([list(prompt_ids)], dtype=torch.long)
    if ids.numel() == 0:
        raise ConfigError(f"request {request_id}: expected a prompt of at least one token, found none")
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": token_types(ids, config),
    }
    given = {name: torch.as_tensor(value) for name, value in opened(mm_inputs)[0].items() if value is not None}
    for name, expected in inputs.items():
        if name in given and not torch.equal(given.pop(name).long(), expected):
            raise ConfigError(
                f"request {request_id}: {name} of mm_inputs differs from what prompt_ids give. Expected the "
                "processor's output for this very prompt, neither padded nor cut"
            )
    if unknown := sorted(set(given) - set(MEDIA_KEYS)):
        name = by_config(config).name
        raise ConfigError(f"request {request_id}: mm_inputs has {', '.join(unknown)}, which {name} does not take")
    merged = patches_per_token(config)
    for media in MEDIA:
        found = int((ids == media.token_id(config)).sum())
        whole = media.pixels in given and media.grid in given
        brought = int(given[media.grid].prod(-1).sum()) // merged if whole else 0
        if found != brought:
            raise ConfigError(
                f"request {request_id}: the prompt has {found} placeholders for {media.pixels}, mm_inputs bring "
                f"{brought}. Pass prompt_ids and mm_inputs from one call of the processor"
            )
    return inputs | given
