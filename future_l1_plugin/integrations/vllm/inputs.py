"""A prompt for vLLM from what the processor returned, so that both see the same ids and pixels."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature
from vllm.inputs.engine import MultiModalInput, TokensInput, mm_input, tokens_input
from vllm.model_executor.models.qwen2_vl import _create_qwen2vl_field_factory
from vllm.multimodal.inputs import MultiModalKwargsItems, PlaceholderRange

from future_l1_plugin.errors import ConfigError

_MEDIA = (("image", "pixel_values", "image_grid_thw"), ("video", "pixel_values_videos", "video_grid_thw"))


def engine_input(prompt_ids: list[int], inputs: Mapping[str, Any], config: Any) -> TokensInput | MultiModalInput:
    """What `AsyncLLM.generate` takes in place of text and pictures; vLLM then runs no processor of its own.

    Args:
        prompt_ids: every image and video placeholder written out.
        inputs: the processor's output for this one prompt; of it pixels and grids are used.
        config: Qwen3-VL's configuration.

    Raises:
        ConfigError: placeholders and grids do not agree.
    """
    given = {name: torch.as_tensor(inputs[name]) for pair in _MEDIA for name in pair[1:] if name in inputs}
    merged = config.vision_config.spatial_merge_size**2
    ids = torch.tensor(prompt_ids)
    placeholders, hashes = {}, {}
    for kind, pixels, grid in _MEDIA:
        where = (ids == getattr(config, f"{kind}_token_id")).nonzero().squeeze(1)
        patches = given[grid].prod(-1).tolist() if grid in given and pixels in given else []
        if len(where) != sum(patches) // merged:
            raise ConfigError(
                f"the prompt has {len(where)} placeholders for {pixels}, the inputs bring {sum(patches) // merged}. "
                "Pass ids and inputs from one call of the processor"
            )
        if patches:
            places = where.split([n // merged for n in patches])
            items = zip(places, given[pixels].split(patches), given[grid], strict=True)
            found = [(_range(kind, at), _name(kind, *tensors)) for at, *tensors in items]
            placeholders[kind], hashes[kind] = ([pair[i] for pair in found] for i in (0, 1))
    if not placeholders:
        return tokens_input(prompt_ids)
    fields = _create_qwen2vl_field_factory(config.vision_config.spatial_merge_size)(given)
    items = MultiModalKwargsItems.from_hf_inputs(BatchFeature(given), fields)
    return mm_input(prompt_ids, items, hashes, placeholders)


def _range(kind: str, where: Tensor) -> PlaceholderRange:
    """An image's placeholders; a video's from the marker before its first frame on, where vLLM looks for frames."""
    start, end = int(where[0]) - (kind == "video"), int(where[-1]) + 1
    embedded = torch.zeros(end - start, dtype=torch.bool)
    embedded[where - start] = True  # between a video's frames stand times and markers
    return PlaceholderRange(start, end - start, embedded)


def _name(kind: str, pixels: Tensor, grid: Tensor) -> str:
    """The same for the same pixels: vLLM's caches of vision features and prompts go by it."""
    digest = hashlib.sha256(f"{kind} {grid.tolist()} {pixels.dtype}".encode())
    digest.update(pixels.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
