"""Stops a run at a loss or gradient that is not finite: before it is saved, by step and records, on all processes.

One such gradient spoils every weight within a step. Trainer would go on, log the loss as 0 and save what it has over
the checkpoints that were good.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from future_l1_plugin.errors import TrainingError
from future_l1_plugin.resume.checkpoints import newest_whole

if TYPE_CHECKING:
    from transformers import Trainer

_SHOWN = 8


class FiniteWatch:
    """What the passes of the optimiser step at hand gave. One a trainer."""

    def __init__(self) -> None:
        self._passes: list[tuple[list[str], torch.Tensor]] = []

    def passed(self, records: list[str], loss: torch.Tensor) -> None:
        """A pass with gradient. loss: scalar; read at the step's end only, so that the device is not waited for."""
        self._passes.append((records, loss.detach()))

    def check(self, trainer: "Trainer", norm: torch.Tensor | float | None) -> None:
        """All processes call it once a step, when gradients are there and nothing is saved.

        Args:
            norm: of the gradient, before clipping. DeepSpeed gives -1 for one that is not finite, and None where it
                has none to tell.

        Raises:
            TrainingError: on every process, if on any of them a loss or the norm is not finite.
        """
        passes, self._passes = self._passes, []
        norm = math.nan if norm is not None and float(norm) < 0 else norm
        losses = [float(loss) for _, loss in passes]
        wrong = [i for i, loss in enumerate(losses) if not math.isfinite(loss)]
        here = bool(wrong) or (norm is not None and not math.isfinite(norm))
        accelerator = trainer.accelerator
        if not accelerator.reduce(torch.tensor(float(here), device=accelerator.device), reduction="sum"):
            return
        # With finite losses any record of the step may be the one.
        records = [name for i, (names, _) in enumerate(passes) if i in wrong or not wrong for name in names]
        raise TrainingError(_message(trainer, float("nan") if norm is None else float(norm), losses, records))


def _message(trainer: "Trainer", norm: float, losses: list[float], records: list[str]) -> str:
    step, rank = trainer.state.global_step + 1, trainer.args.process_index
    bad = next((loss for loss in losses if not math.isfinite(loss)), None)
    what = f"a loss of {bad}" if bad is not None else f"a gradient norm of {norm} (losses: {_listed(losses)})"
    whose = f", by process {rank}" if trainer.args.world_size > 1 else ""
    newest = newest_whole(Path(trainer.args.output_dir)).newest
    kept = f"{newest} is whole, and the same command goes on from it" if newest else "There is no checkpoint yet"
    cause = (
        "These records may be the cause (future-l1 data check)"
        if bad is not None
        else "If it comes again at the same step, these records are the cause. If not, it is the attention kernel: "
        "cuDNN's gives such gradients on H100 with torch 2.11 to 2.13 (pytorch issue 196678). Set "
        "train.attn_implementation to flash_attention_2 or eager, with which a run may go on"
    )
    return (
        f"step {step}: {what}{whose}. Nothing of this step was saved. {kept}. Records of the step: {_listed(records)}. "
        f"{cause}. If the loss rose before, take a lower train.learning_rate and another output."
    )


def _listed(values: list[Any]) -> str:
    more = f" and {len(values) - _SHOWN} more" if len(values) > _SHOWN else ""
    return ", ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in values[:_SHOWN]) + more
