"""What a prompt shows, item by item, and its names in vLLM's caches. Needs no vLLM."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from future_l1_plugin.errors import ConfigError
from future_l1_plugin.model.backbone import MEDIA, Media


def media_hashes(inputs: Mapping[str, Any]) -> dict[str, list[str]]:
    """Names of what a prompt shows: equal for equal pixels, grids and dtypes, on every machine.

    Reads every pixel, so: once a prompt, however often it is asked. `engine_input` takes the names.

    Args:
        inputs: the processor's output for one prompt; of it pixels and grids are used. Pixels may be bfloat16: Qwen3-VL
            casts them to its own dtype first thing, so in a bfloat16 model they give what float32 pixels give. Their
            names differ.

    Returns:
        For each kind that is shown, "image" or "video", one name an item, in order.

    Raises:
        ConfigError: pixels and grids do not agree.
    """
    found = {}
    for media in MEDIA:
        if items := items_of(inputs, media):
            found[media.kind] = [_name(media.kind, *item) for item in items]
    return found


def items_of(inputs: Mapping[str, Any], media: Media) -> list[tuple[Tensor, Tensor]]:
    """(patches (P, D), grid Long (3,)) of every image or video. Raises ConfigError if they do not agree."""
    pixels, grid = media.pixels, media.grid
    if pixels not in inputs and grid not in inputs:
        return []
    if pixels not in inputs or grid not in inputs:
        raise ConfigError(f"expected {pixels} and {grid} together, found {pixels if pixels in inputs else grid} alone")
    patches, grids = torch.as_tensor(inputs[pixels]), torch.as_tensor(inputs[grid])
    counts = grids.prod(-1).tolist()
    if sum(counts) != len(patches):
        raise ConfigError(
            f"{grid} tells of {sum(counts)} patches, {pixels} has {len(patches)}. Pass both from one call of the "
            "processor"
        )
    return list(zip(patches.split(counts), grids, strict=True))


def _name(kind: str, pixels: Tensor, grid: Tensor) -> str:
    digest = hashlib.sha256(f"{kind} {grid.tolist()} {pixels.dtype}".encode())
    # As bytes, since numpy knows no bfloat16.
    digest.update(pixels.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
