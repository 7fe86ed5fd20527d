"""What an SFT run is worth while it trains: loss on held-out records, early stopping by it, and spans in real answers.

The losses are means over the held-out set: cross-entropy over all trained decisions, the latent loss over all latents,
whatever the batches; on several ranks, a last batch that they do not fill repeats a few records. Answers are decoded
greedily, by `model.generate`, as a user's are.

On several ranks each decodes its share of the prompts. Under ZeRO-3, where a forward pass is a collective operation,
all do equally many batches, each of exactly `max_new_tokens` steps; what follows the end of an answer is cut off.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from future_l1_plugin.data.prompt import encode_prompt, twiff_prompt
from future_l1_plugin.data.record_files import Records, load_records
from future_l1_plugin.data.record_lengths import RecordLengths, check_record_lengths
from future_l1_plugin.data.records import TwiffRecord
from future_l1_plugin.data.sft import SftDataset, check_records
from future_l1_plugin.integrations.sft.recipe import SftRecipe
from future_l1_plugin.latent.spans import spans_of
from future_l1_plugin.latent.tokens import LatentTokens
from future_l1_plugin.model.batch import left_padded
from future_l1_plugin.model.checkpoint import divided
from future_l1_plugin.model.decode import generate

if TYPE_CHECKING:
    from transformers import Trainer


def held_out(recipe: SftRecipe, lengths: RecordLengths) -> Records | None:
    """The first records of `eval.records`, checked as those of training are; None if the recipe names none."""
    if recipe.eval.records is None:
        return None
    root = recipe.eval.videos or recipe.data.videos
    records = load_records(recipe.eval.records, video_root=root or None, on_bad=recipe.data.on_bad)
    records = check_records(records, recipe.data.on_bad, recipe.data.question_media)
    records = Records(records[: recipe.eval.limit], records.bad)
    return check_record_lengths(records, lengths, recipe.data.on_bad)


def _decodable(records: Sequence[TwiffRecord], recipe: SftRecipe) -> list[TwiffRecord]:
    """The first `eval.prompts` that show something, found to decode now and not at the end of the run; under `skip`
    others stand in."""
    shown = [record for record in records if record.image] or list(records)
    found = SftDataset(shown, spans=False, on_bad=recipe.data.on_bad, max_failed=recipe.data.max_failed)
    return [found[i].record for i in range(min(recipe.eval.prompts, len(found)))]


@dataclass(frozen=True)
class SpanCounts:
    """Spans in decoded answers. A span that the limit of tokens cut off before its first latent is not counted."""

    responses: int
    spans: int
    empty: int
    latents: int

    @classmethod
    def of(cls, responses: list[list[int]], tokens: LatentTokens) -> "SpanCounts":
        """Args: responses: token ids of each answer."""
        held = [n for ids in responses for _, n, closed in spans_of(ids, tokens) if closed or n]
        return cls(len(responses), len(held), held.count(0), sum(held))

    def metrics(self) -> dict[str, float]:
        """Where there is no span, the share of empty ones and the latents of one are 0."""
        return {
            "spans_per_response": round(self.spans / max(1, self.responses), 4),
            "share_of_empty_spans": round(self.empty / max(1, self.spans), 4),
            "latents_per_span": round(self.latents / max(1, self.spans), 4),
        }


class SpanProbe:
    """Answers a few prompts and counts spans.

    Args:
        records: whose questions are asked. All show pictures or none does: under ZeRO-3 each rank must run the vision
            tower equally often.
        processor: of the latent checkpoint.
        tokens: the latent tokens.
        question_media: as in `SftCollator`.
        max_new_tokens: of an answer.
    """

    def __init__(
        self,
        records: list[TwiffRecord],
        processor: Any,
        tokens: LatentTokens,
        question_media: str,
        max_new_tokens: int,
    ) -> None:
        self.records, self.processor, self.tokens = records, processor, tokens
        self.question_media, self.max_new_tokens = question_media, max_new_tokens

    def count(self, trainer: "Trainer") -> SpanCounts:
        """Of all ranks' answers. Every rank must call it."""
        rank, ranks = trainer.args.process_index, trainer.args.world_size
        mine = self.records[rank::ranks]
        real = len(mine)
        if divided() and real < math.ceil(len(self.records) / ranks):
            mine = [*mine, self.records[0]]  # decoded with the others, and not counted
        responses: list[list[int]] = []
        model = trainer.accelerator.unwrap_model(trainer.model)
        model = model.get_base_model() if hasattr(model, "get_base_model") else model  # adapters stay in it
        training = model.training
        model.eval()
        # Autocast keeps the weights that it has cast until its context ends, here after all tokens.
        with same_random_numbers(), torch.no_grad(), trainer.accelerator.autocast():
            for start in range(0, len(mine), trainer.args.per_device_eval_batch_size):
                responses += self._answers(model, mine[start : start + trainer.args.per_device_eval_batch_size])
        model.train(training)
        counts = SpanCounts.of(responses[:real], self.tokens)
        sums = torch.tensor([counts.responses, counts.spans, counts.empty, counts.latents], device=trainer.args.device)
        return SpanCounts(*trainer.accelerator.reduce(sums, reduction="sum").tolist())

    def _answers(self, model: Any, records: list[TwiffRecord]) -> list[list[int]]:
        prompts = [encode_prompt(twiff_prompt(record, self.question_media), self.processor) for record in records]
        inputs = left_padded([one.inputs for one in prompts], self.processor.tokenizer.pad_token_id, model.device)
        ends = model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends])
        beyond = model.config.get_text_config().vocab_size  # an id that no answer has
        out = generate(
            model,
            inputs,
            max_new_tokens=self.max_new_tokens,
            tokenizer=self.processor.tokenizer,
            use_cache=True,  # transformers.Trainer switches it off in the model's configuration
            **({"eos_token_id": beyond} if divided() else {}),
        )
        responses = [response.tolist() for response in out.responses]
        return [ids[: next((i for i, token in enumerate(ids) if token in ends), None)] for ids in responses]


@contextlib.contextmanager
def same_random_numbers() -> Iterator[None]:
    """What is drawn within leaves no trace: a run with evaluations trains as one without."""
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else []):
        yield


class StopEarly(TrainerCallback):
    """Ends a run whose evaluation loss has not fallen for `patience` evaluations.

    transformers' EarlyStoppingCallback keeps its count in itself, and a resumed run begins at 0. This one counts in the
    log history, which every checkpoint holds, so a resumed run stops where the unbroken one does. Loading the best
    checkpoint is the trainer's own `load_best_model_at_end`.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience

    def waited(self, state: Any) -> int:
        """Evaluations since the lowest loss."""
        lowest, waited = math.inf, 0
        for row in state.log_history:
            if "eval_loss" in row:
                waited = 0 if row["eval_loss"] < lowest else waited + 1
                lowest = min(lowest, row["eval_loss"])
        return waited

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._find_best(args, state)
        if self.waited(state) >= self.patience:
            control.should_training_stop = True  # killed behind its end: `LatentLosses._run_epoch` makes no step

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.waited(state) < self.patience:
            return
        control.should_training_stop = True
        if state.is_world_process_zero:
            print(f"early stopping: no lower eval_loss in {self.patience} evaluations, at step {state.global_step}")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._find_best(args, state)

    def _find_best(self, args: Any, state: Any) -> None:
        """The best checkpoint by its step: the run's folder may have moved, and not every host notes the path."""
        if state.best_global_step:
            folder = Path(args.output_dir) / f"checkpoint-{state.best_global_step}"
            if folder.is_dir():
                state.best_model_checkpoint = str(folder)


class Evaluation:
    """All that a run evaluates.

    Args:
        recipe: the run's.
        data: its training records.
        processor: of the latent checkpoint.
        tokens: the latent tokens.
        lengths: of records.

    Attributes:
        records: held-out records, None without.
        probe: what the trainer decodes at each evaluation, or without any at the end; None for nothing.
        callbacks: for the trainer, in front of those that log.

    Raises:
        ConfigError, DataError: as `load_records` and `check_records`, of the held-out file.
    """

    def __init__(
        self,
        recipe: SftRecipe,
        data: list[TwiffRecord],
        processor: Any,
        tokens: LatentTokens,
        lengths: RecordLengths,
    ) -> None:
        self.recipe, self.records = recipe, held_out(recipe, lengths)
        self.callbacks: list[TrainerCallback] = []
        if recipe.eval.patience is not None:
            self.callbacks.append(StopEarly(recipe.eval.patience))
        asked = _decodable(data if self.records is None else self.records, recipe) if recipe.data.spans else []
        self.probe: SpanProbe | None = None
        #: Whether the records teach spans at all.
        self.spans = recipe.data.spans and any(record.reasoning_image for record in data)
        if asked:
            self.probe = SpanProbe(asked, processor, tokens, recipe.data.question_media, recipe.eval.max_new_tokens)

    def verdict(self, state: Any) -> list[str]:
        """What is said of a run behind its end, by the weights that `final` is made of."""
        lines = []
        best = state.best_global_step if self.recipe.eval.patience is not None else None
        if best:
            lines.append(f"final is checkpoint-{best}, the lowest eval_loss: {state.best_metric:.4f}")
        rows = [row for row in state.log_history if best is None or row["step"] == best]
        for prefix in ("train", "eval"):
            found = [row for row in rows if f"{prefix}_spans_per_response" in row]
            if found and self.spans:
                lines += self._warnings(found[-1], prefix)
        return lines

    def _warnings(self, row: dict[str, float], prefix: str) -> list[str]:
        train, share = self.recipe.train, row[f"{prefix}_share_of_empty_spans"]
        rate = f"{train.learning_rate:g}"
        reasons = f"too few steps (train.max_steps, train.epochs) or too low a train.learning_rate ({rate})"
        if train.lora.rank:
            reasons += f", or too small a train.lora.rank ({train.lora.rank})"
        if not row[f"{prefix}_spans_per_response"]:
            what = f"none of the {len(self.probe.records)} answers decoded holds a latent span, though the records do"
        elif share > 0.5:
            what = f"{share:.0%} of the latent spans in the answers decoded are empty"
            if not self.recipe.latent.train_going_on:
                reasons = (
                    "latent.train_going_on=false: nothing taught the model to go on in a span. Train with true, or "
                    "convert the start checkpoint with fixed_latent_budget=true"
                )
        else:
            return []
        return [f"warning: {what}. Likely reason: {reasons}"]
