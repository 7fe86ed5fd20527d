"""A prompt for vLLM from what the processor returned, so that both see the same ids and pixels."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature
from vllm.inputs.engine import MultiModalInput, TokensInput, mm_input, tokens_input
from vllm.multimodal.inputs import MultiModalKwargsItems, PlaceholderRange

from future_l1_plugin.errors import ConfigError
from future_l1_plugin.integrations.vllm.media import items_of, media_hashes
from future_l1_plugin.model.backbone import MEDIA, by_config, patches_per_token


def engine_input(
    prompt_ids: list[int], inputs: Mapping[str, Any], config: Any, hashes: Mapping[str, Sequence[str]] | None = None
) -> TokensInput | MultiModalInput:
    """What `AsyncLLM.generate` takes in place of text and pictures; vLLM then runs no processor of its own.

    Args:
        prompt_ids: every image and video placeholder written out.
        inputs: the processor's output for this one prompt; of it pixels and grids are used.
        config: the model's configuration.
        hashes: `media_hashes` of these inputs. None: taken here, which reads every pixel.

    Raises:
        ConfigError: placeholders, pixels, grids and hashes do not agree.
    """
    merged = patches_per_token(config)
    ids = torch.tensor(prompt_ids)
    given, placeholders = {}, {}
    for media in MEDIA:
        where = (ids == media.token_id(config)).nonzero().squeeze(1)
        counts = [len(patches) // merged for patches, _ in items_of(inputs, media)]
        if len(where) != sum(counts):
            raise ConfigError(
                f"the prompt has {len(where)} placeholders for {media.pixels}, the inputs bring {sum(counts)}. "
                "Pass ids and inputs from one call of the processor"
            )
        if counts:
            given |= {name: torch.as_tensor(inputs[name]) for name in (media.pixels, media.grid)}
            placeholders[media.kind] = [_range(media.kind, at) for at in where.split(counts)]
    if not placeholders:
        return tokens_input(prompt_ids)
    hashes = media_hashes(given) if hashes is None else {kind: list(names) for kind, names in hashes.items()}
    if (have := _counts(hashes)) != (want := _counts(placeholders)):
        raise ConfigError(f"hashes: expected names for {want}, found {have}. Pass media_hashes of the same inputs")
    fields = by_config(config).vllm.fields.load()(config.vision_config.spatial_merge_size)(given)
    items = MultiModalKwargsItems.from_hf_inputs(BatchFeature(given), fields)
    return mm_input(prompt_ids, items, hashes, placeholders)


def _counts(of_kinds: Mapping[str, Sequence[Any]]) -> dict[str, int]:
    return {kind: len(found) for kind, found in of_kinds.items()}


def _range(kind: str, where: Tensor) -> PlaceholderRange:
    """An image's placeholders; a video's from the marker before its first frame on, where vLLM looks for frames."""
    start, end = int(where[0]) - (kind == "video"), int(where[-1]) + 1
    embedded = torch.zeros(end - start, dtype=torch.bool)
    embedded[where - start] = True  # between a video's frames stand times and markers
    return PlaceholderRange(start, end - start, embedded)
