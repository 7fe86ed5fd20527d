"""One SFT run: records -> dataset -> collator -> model -> trainer -> final checkpoint, in the host of the recipe.

python -m future_l1_plugin.integrations.sft.run RECIPE [key=value ..]     what scripts/sft.sh starts, once a GPU
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from future_l1_plugin.compat import require_attention
from future_l1_plugin.config import load_recipe
from future_l1_plugin.errors import ConfigError, UserError
from future_l1_plugin.integrations.sft import fit
from future_l1_plugin.integrations.sft.hosts import host_of
from future_l1_plugin.integrations.sft.nodes import same_for_all
from future_l1_plugin.integrations.sft.recipe import LatentRecipe, SftRecipe
from future_l1_plugin.integrations.sft.resume import Start

if TYPE_CHECKING:
    from future_l1_plugin.data.record_files import Records
    from future_l1_plugin.data.record_lengths import RecordLengths


def run(recipe: SftRecipe) -> Path:
    """Train as the recipe says and return the folder of the final checkpoint (`output/final`).

    Raises ConfigError, CheckpointError, DataError or EnvironmentMismatch before any training step if something does not
    fit; TrainingError at a step whose loss or gradient is not finite.
    """
    import torch
    from transformers import set_seed

    from future_l1_plugin.data.record_lengths import RecordLengths
    from future_l1_plugin.data.sft import SftCollator, SftDataset
    from future_l1_plugin.integrations.sft.evaluation import Evaluation
    from future_l1_plugin.integrations.sft.failures import FailedRecords
    from future_l1_plugin.integrations.sft.lora import quantization
    from future_l1_plugin.integrations.sft.trainer import JsonlLog, ScheduleOfTheLongerRun, save_final
    from future_l1_plugin.model import load
    from future_l1_plugin.model.checkpoint import divided, gathered
    from future_l1_plugin.model.objective import TEACHER_FORCING, OwnLatents
    from future_l1_plugin.model.reading import latent_and_processor
    from future_l1_plugin.model.training import check_whole

    # Gradients of a small model in float32 underflow to denormal numbers, on which a CPU is up to ten times slower.
    # Worker threads inherit the setting, so it must come before the first parallel operation.
    torch.set_flush_denormal(True)
    output, train, log = Path(recipe.output), recipe.train, recipe.log
    final, checkpoints = output / "final", output / "checkpoints"
    require_attention(train.attn_implementation, "train.attn_implementation")
    host = host_of(recipe)
    arguments = host.arguments(recipe, checkpoints)
    if arguments.process_index == 0:
        print(host.line, flush=True)
    start = Start.of(recipe, arguments)
    same_for_all(recipe.output, f"{start.newest or 'no checkpoint'}{', finished' * start.finished}")
    if start.finished:
        print(f"{final} is there already: nothing to do (log.resume=false trains anew)")
        return final
    set_seed(train.seed)
    fit.check(recipe, host, arguments.world_size, arguments.bf16, arguments, going_on=start.newest is not None)
    check_whole(recipe.model, "model")  # adapters made from here on would name it as what they belong to
    latent, processor = latent_and_processor(recipe.model, **latent_keys(recipe.latent))
    shown = (processor, latent, recipe.data.question_media, recipe.data.spans, recipe.data.max_length)
    lengths = RecordLengths(*shown)
    data = _records(recipe, lengths, start)
    inputs = start.take_inputs(data)
    evaluation = Evaluation(recipe, data, processor, latent.tokens, lengths)
    going_on = recipe.latent.train_going_on and recipe.data.spans and not latent.fixed_latent_budget
    if recipe.latent.train_going_on and latent.fixed_latent_budget and arguments.process_index == 0:
        print("latent.train_going_on: nothing to train, the checkpoint fixes the length of spans (fixed_latent_budget)")
    model, processor = load(
        recipe.model,
        device=None if divided() else arguments.device if train.lora.bits else "cpu",  # the trainer places it
        dtype=torch.float32,
        attn_implementation=train.attn_implementation,
        quantization=quantization(train.lora.bits, arguments.bf16),
        **latent_keys(recipe.latent),
    )
    own = OwnLatents(recipe.latent.own_share, recipe.latent.own_passes, recipe.latent.own_mean_cosine)
    model = host.prepare(model, recipe, arguments)
    if arguments.process_index == 0:
        start.open_folder(inputs)
        for line in start.lines:
            print(line, flush=True)
    failed = FailedRecords(recipe.data.max_failed)
    bad = {"fault": lengths.fault, "on_bad": recipe.data.on_bad, "max_failed": recipe.data.max_failed}
    callbacks = [*evaluation.callbacks, failed, JsonlLog(output / "metrics.jsonl")]
    if start.newest:
        callbacks.append(ScheduleOfTheLongerRun())
    if log.tensorboard and arguments.process_index == 0:
        callbacks.append(_tensorboard(output / "tensorboard"))
    trainer = host.trainer()(
        model=model,
        args=arguments,
        latent=latent,
        own=own if recipe.data.spans else TEACHER_FORCING,  # without spans the extra passes would be for nothing
        going_on=going_on,
        probe=evaluation.probe,
        failed=failed,
        packing=train.packing,
        eval_dataset=evaluation.records and SftDataset(evaluation.records, recipe.data.spans, **bad),
        train_dataset=SftDataset(data, recipe.data.spans, recipe.data.cache_mb * 2**20, **bad),
        data_collator=SftCollator(*shown),
        callbacks=callbacks,
    )
    if start.newest:
        print(f"resuming from {start.newest}")
    trainer.train(resume_from_checkpoint=str(start.newest) if start.newest else None)
    model = trainer.accelerator.unwrap_model(trainer.model)
    with gathered(model):
        if trainer.is_world_process_zero():
            save_final(model, processor, final)
    if arguments.process_index == 0:
        for line in evaluation.verdict(trainer.state):
            print(line, file=sys.stderr if line.startswith("warning") else sys.stdout, flush=True)
    return final


def latent_keys(latent: LatentRecipe) -> dict[str, Any]:
    """The checkpoint's latent keys that the recipe sets otherwise."""
    keys = {
        "latent_loss": latent.loss,
        "latent_lambda": latent.weight,
        "max_latent_token": latent.max_latent_token,
        "train_fixed_latent_budget": latent.train_fixed_latent_budget,
    }
    return {key: value for key, value in keys.items() if value is not None}


def _records(recipe: SftRecipe, lengths: "RecordLengths", start: Start) -> "Records":
    """The records that can be trained on; what was left out is told.

    Raises DataError: bad records under `on_bad: raise`, or no good one.
    """
    from future_l1_plugin.data.record_files import load_records
    from future_l1_plugin.data.record_lengths import check_record_lengths
    from future_l1_plugin.data.sft import check_records

    data = load_records(recipe.data.records, video_root=recipe.data.videos or None, on_bad=recipe.data.on_bad)
    before = start.as_before(data)
    data = data if before is None else before
    if before is None or recipe.data.on_bad == "raise":  # else another stands in for a record that fails
        data = check_records(data, recipe.data.on_bad, recipe.data.question_media)
        data = check_record_lengths(data, lengths, recipe.data.on_bad)
    for bad in data.bad[:10]:
        print(f"left out: {bad.source} {bad.id}: {bad.reason}", file=sys.stderr)
    if data.bad:
        print(f"left out {len(data.bad)} of {len(data.bad) + len(data)} records", file=sys.stderr)
    if silent := sum(not record.image for record in data):
        print(f"{silent:,} of {len(data):,} records show no frame in their question (`image` is empty): they are text")
    if few := _few(len(data), recipe.train.batch_size):
        print(few, file=sys.stderr)
    return data


def _few(records: int, batch_size: int) -> str:
    """What becomes of a batch that the records do not fill; empty if they do."""
    if records >= batch_size:
        return ""
    return (
        f"train.batch_size: a step takes {batch_size} samples, there are {records} records. Each step trains on all "
        f"of them, an epoch is one step. Lower it to {records} or less, or add records"
    )


def _tensorboard(folder: Path):
    """TensorBoard files in `folder`. report_to="tensorboard" would take the folder from the environment."""
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    return TensorBoardCallback(SummaryWriter(str(folder)))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m future_l1_plugin.integrations.sft.run", description=__doc__)
    parser.add_argument("recipe", help="a YAML file, e.g. recipes/sft_micro.yaml")
    parser.add_argument("overrides", nargs="*", help="key=value, e.g. train.max_steps=20")
    arguments = parser.parse_args(argv)
    try:
        recipe = load_recipe(arguments.recipe, SftRecipe, arguments.overrides)
        if recipe.sweep.key:
            raise ConfigError(f"{arguments.recipe}: a sweep is several runs. Start it with scripts/sft.sh")
        run(recipe)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
