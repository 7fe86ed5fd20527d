"""What a checkpoint says of itself, without its weights."""

from pathlib import Path
from typing import Any

from future_l1_plugin.errors import CheckpointError
from future_l1_plugin.model.backbone import NAMES
from future_l1_plugin.model.checkpoint import load_processor
from future_l1_plugin.model.config import LatentConfig
from future_l1_plugin.model.folders import check_folder, is_absent, reading
from future_l1_plugin.model.training import sources


def latent_and_processor(path: str | Path, **overrides: Any) -> tuple[LatentConfig, Any]:
    """Latent keys and processor of what `load` would load; arguments and errors are its."""
    from transformers import AutoConfig

    if is_absent(path):
        raise CheckpointError(f"{path}: no such folder. Expected a latent {NAMES} checkpoint or a hub id.")
    parts = sources(path)
    check_folder(parts.config)
    with reading(parts.config):
        found = LatentConfig.from_hf(AutoConfig.from_pretrained(parts.config))
    latent = LatentConfig(**{**vars(found), **overrides})
    return latent, load_processor(parts.processor, latent)
