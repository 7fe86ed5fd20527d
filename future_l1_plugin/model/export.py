"""A run's checkpoint as a latent checkpoint that any tool reads."""

from pathlib import Path

import torch

from future_l1_plugin.errors import CheckpointError
from future_l1_plugin.model.checkpoint import load, save
from future_l1_plugin.model.folders import check_new
from future_l1_plugin.model.training import base_of, sources, stored_dtype


def export(checkpoint: str | Path, out: str | Path, base: str | Path | None = None) -> Path:
    """Write a run's checkpoint as a latent checkpoint: adapters merged, with processor and latent head, in the dtype of
    the checkpoint that the run started from.

    Args:
        base: that checkpoint, where the folder does not tell.

    Raises:
        CheckpointError: see `sources`; or the checkpoint is one already, or `out` holds files.
    """
    from transformers import AutoConfig

    parts = sources(checkpoint, base)
    if parts.is_whole and not (Path(checkpoint) / "trainer_state.json").exists():
        raise CheckpointError(f"{checkpoint}: is no checkpoint of a run in training; use it as it is")
    check_new(out)
    start = base_of(checkpoint, base)
    model, processor = load(checkpoint, dtype=torch.float32, base=base)
    save(model, processor, out, dtype=stored_dtype(AutoConfig.from_pretrained(start)))
    return Path(out)
