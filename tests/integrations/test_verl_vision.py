"""Ranks that show different things in a micro-batch run the vision tower equally often."""

import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

pytest.importorskip("verl")

from future_l1_plugin.integrations.verl.vision import as_images
from future_l1_plugin.model import make_tiny

IMAGE, VIDEO = 8, 9
CONFIG = types.SimpleNamespace(
    image_token_id=IMAGE, video_token_id=VIDEO, vision_config=types.SimpleNamespace(spatial_merge_size=2)
)


def test_videos_go_among_the_images_in_the_order_of_the_text():
    """Row 0: a video of two frames (its tokens parted by a time stamp), then an image. Row 1: an image, a video."""
    ids = torch.tensor([1, VIDEO, 5, VIDEO, 2, IMAGE, IMAGE, 3, 7, IMAGE, 4, VIDEO, 6])
    images = torch.arange(12.0)[:, None]  # 8 patches, 4 patches
    videos = 100 + torch.arange(12.0)[:, None]
    inputs = {
        "input_ids": ids.view(1, -1),
        "position_ids": "kept",
        "pixel_values": images,
        "image_grid_thw": torch.tensor([[1, 2, 4], [1, 2, 2]]),
        "pixel_values_videos": videos,
        "video_grid_thw": torch.tensor([[2, 2, 2], [1, 2, 2]]),
    }
    found = as_images(inputs, ids, CONFIG)
    assert set(found) == {"input_ids", "position_ids", "pixel_values", "image_grid_thw"}
    assert found["input_ids"][0].tolist() == [1, 8, 5, 8, 2, 8, 8, 3, 7, 8, 4, 8, 6]
    assert found["image_grid_thw"].tolist() == [[2, 2, 2], [1, 2, 4], [1, 2, 2], [1, 2, 2]]
    assert torch.equal(found["pixel_values"], torch.cat([videos[:8], images[:8], images[8:], videos[8:]]))
    for kind in ("pixel_values", "pixel_values_videos"):
        alone = {key: value for key, value in inputs.items() if key != kind}
        assert as_images(alone, ids, CONFIG) is alone
    with pytest.raises(ValueError, match="expected 3 placeholders 8 for 2 items, found 2"):
        as_images(inputs, torch.tensor([VIDEO, IMAGE, IMAGE]), CONFIG)


def test_two_ranks_with_different_media_do_not_wait_for_each_other(tmp_path):
    make_tiny(tmp_path / "tiny", seed=0)
    script = Path(__file__).with_name("verl_two_ranks.py")
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(tmp_path / "tiny"), str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=240)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, output in zip(ranks, said, strict=True):
        assert rank.returncode == 0 and output.count("passed") == 10, output[-3000:]
