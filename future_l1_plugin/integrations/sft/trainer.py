"""Latent SFT in a trainer: our objective in, two losses in the log, a JSONL of all metrics, the final checkpoint."""

import hashlib
import json
from copy import copy, deepcopy
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from future_l1_plugin.integrations.sft.evaluation import SpanProbe, same_random_numbers
from future_l1_plugin.integrations.sft.failures import FailedRecords
from future_l1_plugin.integrations.sft.finite import FiniteWatch
from future_l1_plugin.model.card import write_card
from future_l1_plugin.model.checkpoint import load, save
from future_l1_plugin.model.config import LatentConfig
from future_l1_plugin.model.objective import TEACHER_FORCING, OwnLatents, sft_losses
from future_l1_plugin.resume.checkpoints import delete, seal


class LatentLosses:
    """For a subclass of transformers.Trainer, named before it: the loss is `sft_losses`.

    `ce_loss` and `latent_loss` (before lambda) are logged apart, `going_on_loss`, a part of `ce_loss`, where it is
    trained. An evaluation has the first two of the whole held-out set, and `eval_loss` is made of them. A loss or
    gradient that is not finite ends the run (TrainingError), and old checkpoints go only when the new one is whole.

    Args:
        latent: the latent keys of the checkpoint.
        own: what the latent inputs are; by default e*.
        going_on: train the choice to go on in a span; see `sft_losses`.
        probe: whose spans are counted at each evaluation; without evaluations at the end, in the summary of the run.
        failed: where records that failed are counted; it is one of the callbacks, too.
        packing: passes without padding; see `sft_losses`.
    """

    def __init__(
        self,
        *args: Any,
        latent: LatentConfig,
        own: OwnLatents = TEACHER_FORCING,
        going_on: bool = False,
        probe: SpanProbe | None = None,
        failed: FailedRecords | None = None,
        packing: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.latent, self.own, self.failed, self.packing = latent, own, failed, packing
        self.going_on, self.probe = going_on, probe
        self._held_out: list[torch.Tensor] = []  # of each pass of an evaluation: sums and counts, see evaluation_loop
        self._step, self._micro = -1, 0  # optimiser step, and pass within it
        # Our loss is a mean over the micro batch: Trainer must divide by the accumulation steps. So 2 x 4 samples
        # weigh each micro batch alike, where 1 x 8 weighs each token alike; with equally long responses they agree.
        self.model_accepts_loss_kwargs = False
        self._sums: dict[str, torch.Tensor] = {}
        self._passes = 0
        self._watch = FiniteWatch()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.failed:
            self.failed.note(inputs.get("failed", ()))
        device = inputs["input_ids"].device
        generator = self._generator(device) if model.training else self._generator_of_evaluation(device)
        autocast = self.accelerator.autocast
        losses = sft_losses(model, self.latent, inputs, self.own, generator, self.going_on, autocast, self.packing)
        if not model.training:
            ce, latent, decisions = losses.ce.double(), losses.latent.double(), losses.decisions.double()
            latents = torch.full_like(decisions, losses.latents)
            self._held_out.append(torch.stack([ce * decisions, decisions, latent * latents, latents]).detach())
            return (losses.total, {}) if return_outputs else losses.total
        parts = {"ce_loss": losses.ce, "latent_loss": losses.latent}
        if self.going_on:
            parts["going_on_loss"] = losses.going_on
        for name, value in parts.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach()
        self._passes += 1
        if losses.total.requires_grad:
            self._watch.passed(inputs["record_ids"], losses.total)
        return (losses.total, {}) if return_outputs else losses.total

    def _generator(self, device: torch.device) -> torch.Generator:
        """Randomness of this pass: a function of seed, step, pass and rank, so that a resumed run draws the same."""
        step = self.state.global_step
        self._step, self._micro = step, self._micro + 1 if step == self._step else 0
        return _generator(f"own latents {self.args.seed} {step} {self._micro} {self.args.process_index}", device)

    def _generator_of_evaluation(self, device: torch.device) -> torch.Generator:
        """The same draws in every evaluation, and none that training would miss."""
        name = f"held out {self.args.seed} {len(self._held_out)} {self.args.process_index}"
        return _generator(name, device)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Means over all decisions and all latents of the held-out set, where Trainer's would be one of batches."""
        self._held_out = []
        with same_random_numbers():
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        sums = self.accelerator.reduce(torch.stack(self._held_out).sum(0), reduction="sum").tolist()
        ce, latent = sums[0] / max(1, sums[1]), sums[2] / max(1, sums[3])
        found = {"loss": ce + self.latent.latent_lambda * latent, "ce_loss": ce, "latent_loss": latent}
        if self.probe is not None:
            found |= self.probe.count(self).metrics()
        output.metrics.update({f"{metric_key_prefix}_{name}": round(value, 5) for name, value in found.items()})
        return output

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """No step of a run that is over, at its last one or stopped early, and was killed before `final` was there. In
        the middle of an epoch Trainer would make one more."""
        if self.state.global_step >= self.state.max_steps or self.control.should_training_stop:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """With processor and configuration, a checkpoint of a run is one that other tools read."""
        super()._save(output_dir, state_dict)
        processor = copy(self.data_collator.processor)
        processor.tokenizer = deepcopy(processor.tokenizer)
        processor.tokenizer.padding_side = "left"
        processor.save_pretrained(output_dir or self.args.output_dir)
        self.model.config.save_pretrained(output_dir or self.args.output_dir)
        write_card(output_dir or self.args.output_dir, self.model.config)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Asked for at each step, before the optimiser makes it; DeepSpeed's engine has made it already."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._watch.check(self, norm)
        return norm

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Trainer deletes old checkpoints before all processes have written the new one. Here it is sealed first."""
        args, folder = self.args, Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if args.should_save and folder.exists():  # what a killed run left of it
            delete(folder)
        self.accelerator.wait_for_everyone()
        keep, args.save_total_limit = args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            args.save_total_limit = keep
        self.accelerator.wait_for_everyone()
        if args.should_save:
            seal(folder)
            rotate_checkpoints(args.output_dir, keep, self.state.best_model_checkpoint)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self._passes and "loss" in logs:
            for name, total in self._sums.items():
                mean = self.accelerator.reduce(total / self._passes, reduction="mean")  # over all devices
                logs[name] = round(float(mean), 5)
            self._sums, self._passes = {}, 0
        if "train_runtime" in logs and self.probe is not None and self.eval_dataset is None:
            logs.update({f"train_{name}": value for name, value in self.probe.count(self).metrics().items()})
        if self.failed and self.failed.reasons and "loss" in logs:
            logs["failed_records"] = len(self.failed.reasons)
        super().log(logs, *args, **kwargs)


def _generator(name: str, device: torch.device) -> torch.Generator:
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7])
    return torch.Generator(device).manual_seed(seed)


class JsonlLog(TrainerCallback):
    """Appends each log of rank 0 to a JSONL file, the summary of the run last.

    A resumed run first drops the steps that it repeats and the summary of the run before.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero and self.path.exists():
            rows = [json.loads(line) for line in self.path.read_text().splitlines() if line.endswith("}")]
            known = (row for row in rows if row["step"] <= state.global_step and row.keys() & {"loss", "eval_loss"})
            kept = [json.dumps(row) for row in known]
            self.path.write_text("".join(line + "\n" for line in kept))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


class ScheduleOfTheLongerRun(TrainerCallback):
    """A run that goes on takes its first learning rate from its own schedule: the optimiser's state brings the rate of
    the schedule before, which may have been that of a run now at its end, 0."""

    def on_train_begin(self, args, state, control, lr_scheduler=None, **kwargs):
        if not isinstance(lr_scheduler, torch.optim.lr_scheduler.LambdaLR):  # transformers' are, but for "by metric"
            return
        pairs = zip(lr_scheduler.base_lrs, lr_scheduler.lr_lambdas, strict=True)
        rates = [base * share(lr_scheduler.last_epoch) for base, share in pairs]
        for group, rate in zip(lr_scheduler.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        lr_scheduler._last_lr = rates  # what is logged


def save_final(model: Any, processor: Any, path: Path) -> None:
    """Write the trained model as an ordinary latent checkpoint, in the dtype of the checkpoint that it started from.

    LoRA weights are merged in; the adapters lie beside them in `path`/adapter, for PEFT. After QLoRA they are merged
    into the weights that it started from, not into their 4 bits.
    """
    dtype, adapter = model.stored_dtype, None
    if hasattr(model, "merge_and_unload"):
        adapter = path.with_name("adapter.part")
        model.save_pretrained(adapter)
        if getattr(model, "is_quantized", False):
            kept = vars(LatentConfig.from_hf(model.config))
            model, processor = load(adapter, dtype=torch.float32, **kept)
        else:
            model = model.merge_and_unload()
    processor.tokenizer.padding_side = "left"
    save(model, processor, path, dtype, adapter)
