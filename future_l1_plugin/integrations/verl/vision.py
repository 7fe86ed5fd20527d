"""One pass of the vision tower a micro-batch, whatever it shows.

FSDP2 gathers each block's weights when the block runs: ranks that run the tower differently often wait for each other
for ever. verl's forward runs it once for images, once for videos, and once on a blank picture where there is neither,
so a micro-batch with both kinds would run it twice. Qwen3-VL's tower takes no notice of the kind (it attends within a
frame, and positions are computed before): both are passed as images, in the order in which the text names them.
"""

from typing import Any

import torch
from torch import Tensor

from future_l1_plugin.model.backbone import (
    GRID_KEYS,
    PICTURES,
    PIXEL_KEYS,
    VIDEOS,
    patches_per_token,
    placeholder_ids,
)


def as_images(inputs: dict[str, Any], ids: Tensor, config: Any) -> dict[str, Any]:
    """A model's inputs with their videos among the images, if there are both; else as they are.

    Args:
        inputs: `input_ids` in any layout, `position_ids`, and of either kind pixels (patches, ..) and grids (items, 3).
        ids: Long (n,), the same ids row after row, without padding.
        config: the model's.
    """
    pixels = [inputs.get(key) for key in PIXEL_KEYS]
    if any(each is None for each in pixels):
        return inputs
    grids = [inputs[key] for key in GRID_KEYS]
    begins = [
        _first_tokens(ids, token, grid, patches_per_token(config))
        for token, grid in zip(placeholder_ids(config), grids, strict=True)
    ]
    order = torch.cat(begins).argsort().tolist()
    patches = [part for each, grid in zip(pixels, grids, strict=True) for part in each.split(grid.prod(1).tolist())]
    rest = {key: value for key, value in inputs.items() if key not in (VIDEOS.pixels, VIDEOS.grid)}
    tokens, (image, video) = inputs["input_ids"], placeholder_ids(config)
    return rest | {
        "input_ids": torch.where(tokens == video, image, tokens),
        PICTURES.pixels: torch.cat([patches[i] for i in order]),
        PICTURES.grid: torch.cat(grids)[order],
    }


def _first_tokens(ids: Tensor, token: int, grid: Tensor, merged: int) -> Tensor:
    """Where in `ids` the placeholders of each item begin. Long (items,)."""
    counts = grid.prod(1) // merged
    where = (ids == token).nonzero()[:, 0]
    if len(where) != int(counts.sum()):
        raise ValueError(f"expected {int(counts.sum())} placeholders {token} for {len(grid)} items, found {len(where)}")
    return where[counts.cumsum(0).to(where.device) - counts.to(where.device)]
