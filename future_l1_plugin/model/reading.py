"""What a checkpoint says of itself, without its weights."""

from pathlib import Path
from typing import Any

from future_l1_plugin.errors import CheckpointError
from future_l1_plugin.model.checkpoint import _check_folder, _is_absent, _reading, load_processor
from future_l1_plugin.model.config import LatentConfig
from future_l1_plugin.model.training import sources


def latent_and_processor(path: str | Path, **overrides: Any) -> tuple[LatentConfig, Any]:
    """Latent keys and processor of what `load` would load; arguments and errors are its."""
    from transformers import AutoConfig

    if _is_absent(path):
        raise CheckpointError(f"{path}: no such folder. Expected a latent Qwen3-VL checkpoint or a hub id.")
    parts = sources(path)
    _check_folder(parts.config)
    with _reading(parts.config):
        found = LatentConfig.from_hf(AutoConfig.from_pretrained(parts.config))
    latent = LatentConfig(**{**vars(found), **overrides})
    return latent, load_processor(parts.processor, latent)
