"""The dry run: what an SFT recipe would do and what it needs, said without loading weights.

What cannot be told here, because a file or the hub is out of reach, is named with the reason. Whether a run fits is
`integrations.sft.fit`'s to say.
"""

import math
import shlex

from omegaconf import OmegaConf

from future_l1_plugin.errors import CheckpointError, ConfigError, EnvironmentMismatch, UserError
from future_l1_plugin.integrations.sft.deepspeed import check_installed
from future_l1_plugin.integrations.sft.fit import Device, needs, problem
from future_l1_plugin.integrations.sft.host import Host
from future_l1_plugin.integrations.sft.hosts import host_of
from future_l1_plugin.integrations.sft.jobs import ONE, Job
from future_l1_plugin.integrations.sft.memory import Part, Sizes, a_checkpoint
from future_l1_plugin.integrations.sft.nodes import Nodes
from future_l1_plugin.integrations.sft.recipe import SftRecipe
from future_l1_plugin.integrations.sft.sizes import model_sizes


def describe(jobs: list[Job], gpus: int, device: Device, nodes: Nodes = ONE) -> tuple[str, str]:
    """(all that a dry run prints, why the run would not fit on `gpus` GPUs of each node or an empty string).

    Raises ConfigError or EnvironmentMismatch for what no run would start with.
    """
    first = jobs[0]
    host = host_of(first.recipe)
    every = gpus * nodes.count
    columns = sorted({1, 8, every})
    commands = _commands(first, columns, gpus, nodes)
    parts = [f"dry run. {host.line}", _recipe(jobs), commands, _steps(first.recipe, columns)]
    if first.recipe.deepspeed:
        try:
            check_installed(first.recipe.sharding_key)
        except EnvironmentMismatch as error:
            parts.append(f"not ready: {error}")
    try:
        sizes = model_sizes(first.recipe, host)
    except CheckpointError as error:
        why = "parameters, memory and whether it fits: not estimated, for want of the model's configuration"
        return "\n\n".join([*parts, f"{why}: {error}"]), ""
    found = problem(first.recipe, host.sharding(), sizes, every, _bf16(first.recipe), device)
    parts += _memory(first.recipe, host, sizes, columns, device)
    parts.append(f"verdict for {_gpus(every)}: {'it does not fit' if found else 'it fits'}, {device.said}")
    return "\n\n".join(parts), found


def _recipe(jobs: list[Job]) -> str:
    text = OmegaConf.to_yaml(OmegaConf.structured(jobs[0].recipe), resolve=True).rstrip()
    if not jobs[0].name:
        return f"resolved recipe:\n{text}"
    names = "\n".join(f"  {job.name} -> {job.recipe.output}" for job in jobs)
    return f"sweep of {len(jobs)} runs, one after the other:\n{names}\n\nresolved recipe of the first:\n{text}"


def _commands(job: Job, columns: list[int], gpus: int, nodes: Nodes) -> str:
    lines = [
        f"  {_gpus(n)}: {shlex.join(job.command(n if n > 1 else None))}"
        for n in columns
        if nodes.count == 1 or n != gpus * nodes.count
    ]
    if nodes.count > 1:
        asked = f"{_gpus(gpus * nodes.count)} on {nodes.count} nodes, here (node {nodes.rank})"
        lines.append(f"  {asked}: {shlex.join(job.command(gpus, nodes))}")
    return "command (GPUS=8 scripts/sft.sh starts the one for 8):\n" + "\n".join(lines)


def _steps(recipe: SftRecipe, columns: list[int]) -> str:
    from future_l1_plugin.data.record_files import load_records

    try:
        data = load_records(recipe.data.records, video_root=recipe.data.videos or None, on_bad=recipe.data.on_bad)
    except UserError as error:
        steps = f", of {recipe.train.max_steps} steps" if recipe.train.max_steps > 0 else ""
        return f"steps: {recipe.train.batch_size} samples a step{steps}; records not counted: {error}"
    lines = [f"steps: {len(data):,} records, {recipe.train.batch_size} samples a step"]
    for n in columns:
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


def _memory(recipe: SftRecipe, host: Host, sizes: Sizes, columns: list[int], device: Device) -> list[str]:
    """Parameters, memory for each number of GPUs, and disk."""
    bf16, sharding = _bf16(recipe), host.sharding()
    precision = "bf16" if bf16 else "fp32"
    if recipe.train.precision == "auto":
        precision += " (train.precision is auto; a GPU that has it)"
    how = f"DeepSpeed {recipe.deepspeed}" if sharding else f"each GPU holds everything ({recipe.sharding_key} is null)"
    lines = [f"memory a GPU, estimated for {precision}; {how}:"]
    sums = []
    for n in columns:
        states, passing = needs(recipe, sharding, sizes, n, bf16)
        lines += [f"  {_gpus(n)}", *map(_line, states), _line(Part("model states", _sum(states), "the sum"))]
        sums.append(f"{_gpus(n)} {_gib(_sum(states) + _sum(passing))}")
    lines.append(f"  activations, the most that data.max_length ({recipe.data.max_length:,} tokens) allows")
    lines += map(_line, passing)
    lines.append(f"  in all: {', '.join(sums)}, without CUDA's own and the vision tower's activations")
    parts = [f"parameters: {sizes.trained:,} trained, {sizes.frozen:,} frozen", "\n".join(lines)]
    if recipe.log.save_every:
        each, keep = a_checkpoint(sizes, bf16, sharding), recipe.log.keep
        parts.append(
            f"disk: about {_gib(each)} a checkpoint, every {recipe.log.save_every:,} steps; log.keep={keep} and one "
            f"that is being written: {_gib((keep + 1) * each)}"
        )
    return parts


def _bf16(recipe: SftRecipe) -> bool:
    return recipe.train.precision != "fp32"


def _sum(parts: list[Part]) -> float:
    return sum(part.bytes for part in parts)


def _line(part: Part) -> str:
    return f"    {part.name:<18} {_gib(part.bytes):>12}   {part.formula}"


def _gib(number: float) -> str:
    return f"{number / 2**30:,.2f} GiB"


def _gpus(n: int) -> str:
    return f"{n} GPU{'s' if n > 1 else ''}"
