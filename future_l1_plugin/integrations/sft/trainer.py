"""Latent SFT in a trainer: our objective in, two losses in the log, a JSONL of all metrics, the final checkpoint."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from future_l1_plugin.integrations.sft.failures import FailedRecords
from future_l1_plugin.model.checkpoint import save
from future_l1_plugin.model.config import LatentConfig
from future_l1_plugin.model.objective import TEACHER_FORCING, OwnLatents, sft_losses


class LatentLosses:
    """For a subclass of transformers.Trainer, named before it: the loss is `sft_losses`.

    `ce_loss` and `latent_loss` (before lambda) are logged apart.

    Args:
        latent: the latent keys of the checkpoint.
        own: what the latent inputs are; by default e*.
        failed: where records that failed are counted; it is one of the callbacks, too.
    """

    def __init__(
        self,
        *args: Any,
        latent: LatentConfig,
        own: OwnLatents = TEACHER_FORCING,
        failed: FailedRecords | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.latent, self.own, self.failed = latent, own, failed
        self._step, self._micro = -1, 0  # optimiser step, and pass within it
        # Our loss is a mean over the micro batch: Trainer must divide by the accumulation steps. So 2 x 4 samples
        # weigh each micro batch alike, where 1 x 8 weighs each token alike; with equally long responses they agree.
        self.model_accepts_loss_kwargs = False
        self._sums: dict[str, torch.Tensor] = {}
        self._passes = 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.failed:
            self.failed.note(inputs.get("failed", ()))
        losses = sft_losses(model, self.latent, inputs, self.own, self._generator(inputs["input_ids"].device))
        for name, value in (("ce_loss", losses.ce), ("latent_loss", losses.latent)):
            self._sums[name] = self._sums.get(name, 0) + value.detach()
        self._passes += 1
        return (losses.total, None) if return_outputs else losses.total

    def _generator(self, device: torch.device) -> torch.Generator:
        """Randomness of this pass: a function of seed, step, pass and rank, so that a resumed run draws the same."""
        step = self.state.global_step
        self._step, self._micro = step, self._micro + 1 if step == self._step else 0
        name = f"own latents {self.args.seed} {step} {self._micro} {self.args.process_index}"
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7])
        return torch.Generator(device).manual_seed(seed)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self._passes and "loss" in logs:
            for name, total in self._sums.items():
                mean = self.accelerator.reduce(total / self._passes, reduction="mean")  # over all devices
                logs[name] = round(float(mean), 5)
            self._sums, self._passes = {}, 0
        if self.failed and self.failed.reasons and "loss" in logs:
            logs["failed_records"] = len(self.failed.reasons)
        super().log(logs, *args, **kwargs)


class JsonlLog(TrainerCallback):
    """Appends each log of rank 0 to a JSONL file, the summary of the run last.

    A resumed run first drops the steps that it repeats and the summary of the run before.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero and self.path.exists():
            rows = [json.loads(line) for line in self.path.read_text().splitlines() if line.endswith("}")]
            kept = [json.dumps(row) for row in rows if row["step"] <= state.global_step and "loss" in row]
            self.path.write_text("".join(line + "\n" for line in kept))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


def save_final(model: Any, processor: Any, path: Path) -> None:
    """Write the trained model as an ordinary latent checkpoint; LoRA weights are merged in."""
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    processor.tokenizer.padding_side = "left"
    save(model, processor, path)
