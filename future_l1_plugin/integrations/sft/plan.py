"""The dry run: what an SFT recipe would do and what it needs, said without loading weights.

What cannot be told here, because a file or the hub is out of reach, is named with the reason.
"""

import dataclasses
import json
import math
import shlex
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from future_l1_plugin.errors import CheckpointError, ConfigError, UserError
from future_l1_plugin.integrations.sft.host import Host, host_of
from future_l1_plugin.integrations.sft.launch import Job
from future_l1_plugin.integrations.sft.memory import Part, Sharding, Sizes, activations, model_states
from future_l1_plugin.integrations.sft.recipe import SftRecipe

GPUS = (1, 8)
#: What the names of `qwen_vl_finetune.deepspeed` stand for in the checkout's scripts/, for when there is no checkout.
NAMED = {
    "zero2": Sharding(2),
    "zero3": Sharding(3),
    "zero2_offload": Sharding(2, offload_optimizer=True),
    "zero3_offload": Sharding(3, offload_optimizer=True, offload_weights=True),
}


def describe(jobs: list[Job]) -> str:
    """All that a dry run prints. Raises ConfigError or EnvironmentMismatch for what no run would start with."""
    first = jobs[0]
    host = host_of(first.recipe)
    parts = [f"dry run. {host.line}", _recipe(jobs), _commands(first)]
    parts += [_steps(first.recipe), *_needs(first.recipe, host)]
    return "\n\n".join(parts)


def _recipe(jobs: list[Job]) -> str:
    text = OmegaConf.to_yaml(OmegaConf.structured(jobs[0].recipe), resolve=True).rstrip()
    if not jobs[0].name:
        return f"resolved recipe:\n{text}"
    names = "\n".join(f"  {job.name} -> {job.recipe.output}" for job in jobs)
    return f"sweep of {len(jobs)} runs, one after the other:\n{names}\n\nresolved recipe of the first:\n{text}"


def _commands(job: Job) -> str:
    lines = [f"  {_gpus(n)}: {shlex.join(job.command(n if n > 1 else None))}" for n in GPUS]
    return "command (GPUS=8 scripts/sft.sh starts the second):\n" + "\n".join(lines)


def _steps(recipe: SftRecipe) -> str:
    from future_l1_plugin.data.records import load_records

    try:
        data = load_records(recipe.data.records, video_root=recipe.data.videos or None, on_bad=recipe.data.on_bad)
    except UserError as error:
        steps = f", of {recipe.train.max_steps} steps" if recipe.train.max_steps > 0 else ""
        return f"steps: {recipe.train.batch_size} samples a step{steps}; records not counted: {error}"
    lines = [f"steps: {len(data):,} records, {recipe.train.batch_size} samples a step"]
    for n in GPUS:
        try:
            passes = recipe.accumulation(n)
        except ConfigError as error:
            lines.append(f"  {_gpus(n)}: not possible: {error}")
            continue
        size = recipe.train.micro_batch_size
        an_epoch = math.ceil(math.ceil(math.ceil(len(data) / size) / n) / passes)
        steps = recipe.train.max_steps if recipe.train.max_steps > 0 else math.ceil(recipe.train.epochs * an_epoch)
        length = f"{steps:,} steps ({steps / an_epoch:.3g} epochs)"
        lines.append(f"  {_gpus(n)}: {length}, passes of {size} on each GPU: {passes} a step")
    return "\n".join(lines)


def _needs(recipe: SftRecipe, host: Host) -> list[str]:
    """Parameters and memory, or why they cannot be told."""
    try:
        sizes = model_sizes(recipe, host)
    except CheckpointError as error:
        return [f"parameters and memory: not estimated, for want of the model's configuration: {error}"]
    counts = f"parameters: {sizes.trained:,} trained, {sizes.frozen:,} frozen"
    bf16 = recipe.train.precision != "fp32"
    precision = "bf16" if bf16 else "fp32"
    if recipe.train.precision == "auto":
        precision += " (train.precision is auto; a GPU that has it)"
    asked = recipe.qwen_vl_finetune
    tables = [f"memory a GPU, estimated for {precision}:"]
    if not asked.path:
        tables.append(_table("transformers.Trainer, each GPU holds everything", recipe, sizes, bf16, None))
    if asked.deepspeed:
        where = asked.deepspeed if asked.path else f"{asked.deepspeed}, if qwen_vl_finetune.path named a checkout"
        sharding = _sharding(recipe, host)
        tables.append(_table(f"DeepSpeed {where}", recipe, sizes, bf16, sharding))
    elif asked.path:
        tables.append(_table("QwenSFTTrainer, each GPU holds everything", recipe, sizes, bf16, None))
    return [counts, *tables]


def model_sizes(recipe: SftRecipe, host: Host) -> Sizes:
    """Sizes of the recipe's model, frozen and adapted as its host would, from the checkpoint's config.json alone.

    Raises CheckpointError: the configuration can be had neither here nor from the hub.
    """
    import torch
    from transformers import Qwen3VLForConditionalGeneration

    from future_l1_plugin.model.checkpoint import attach_head
    from future_l1_plugin.model.config import LatentConfig

    config = _config(recipe.model)
    latent = LatentConfig.from_hf(config)
    arguments = host.arguments(_unsharded(recipe), Path(recipe.output) / "checkpoints")
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(config)
        attach_head(model, latent)
        model = host.prepare(model, recipe, arguments)
    own = [sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules()]
    text = config.text_config
    return Sizes(
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        frozen=sum(p.numel() for p in model.parameters() if not p.requires_grad),
        largest=max(own),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        inner=text.intermediate_size,
        queries=text.num_attention_heads * text.head_dim,
        keys=text.num_key_value_heads * text.head_dim,
        vocabulary=text.vocab_size,
    )


def _config(path: str) -> Any:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        said = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{path}: no such folder here, and the hub did not give it ({said})") from error
    if config.model_type != "qwen3_vl":
        raise CheckpointError(f"{path}: expected model_type 'qwen3_vl', found {config.model_type!r}")
    return config


def _unsharded(recipe: SftRecipe) -> SftRecipe:
    """Arguments under DeepSpeed would start its communication, for which a dry run has no partners."""
    return dataclasses.replace(recipe, qwen_vl_finetune=dataclasses.replace(recipe.qwen_vl_finetune, deepspeed=None))


def _sharding(recipe: SftRecipe, host: Host) -> Sharding:
    asked = recipe.qwen_vl_finetune
    if asked.path:
        file = host.deepspeed_file(asked.deepspeed)
    elif asked.deepspeed in NAMED:
        return NAMED[asked.deepspeed]
    else:
        file = Path(asked.deepspeed)
        if not file.is_file():
            raise ConfigError(f"qwen_vl_finetune.deepspeed: expected one of {', '.join(NAMED)} or a file, found {file}")
    return Sharding.from_config(json.loads(file.read_text(encoding="utf-8")))


def _table(title: str, recipe: SftRecipe, sizes: Sizes, bf16: bool, sharding: Sharding | None) -> str:
    """Model states for each number of GPUs, activations, and their sums."""
    train, tokens = recipe.train, recipe.train.micro_batch_size * recipe.data.max_length
    lines = [f"{title}"]
    states = [model_states(sizes, n, bf16, sharding) for n in GPUS]
    passing = activations(sizes, tokens, bf16, train.gradient_checkpointing)
    for n, parts in zip(GPUS, states, strict=True):
        lines += [f"  {_gpus(n)}", *map(_line, parts)]
        lines.append(_line(Part("model states", _sum(parts), "the sum")))
    lines += [f"  activations, the most that data.max_length ({recipe.data.max_length:,} tokens) allows"]
    lines += map(_line, passing)
    sums = [f"{_gpus(n)} {_gib(_sum(parts) + _sum(passing))}" for n, parts in zip(GPUS, states, strict=True)]
    return "\n".join([*lines, f"  in all: {', '.join(sums)}, without CUDA's own and the vision tower's activations"])


def _sum(parts: list[Part]) -> float:
    return sum(part.bytes for part in parts)


def _line(part: Part) -> str:
    return f"    {part.name:<18} {_gib(part.bytes):>12}   {part.formula}"


def _gib(number: float) -> str:
    return f"{number / 2**30:,.2f} GiB"


def _gpus(n: int) -> str:
    return f"{n} GPU{'s' if n > 1 else ''}"
