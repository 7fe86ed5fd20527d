"""Small things that several tests make: pictures, and checkpoints that open latent spans by themselves."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np


def picture(seed: int, height: int = 64, width: int = 64) -> np.ndarray:
    """uint8 (height, width, 3), noise."""
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)


def opening_checkpoint(source: Path, folder: Path, **keys: Any) -> Path:
    """A copy of a checkpoint that begins each response with a latent span; `keys`: more of its config.json.

    Random models and those of a few steps hardly ever open one.
    """
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"force_initial_latent_mode": True} | keys))
    return folder
