"""The dry run of an RL recipe: `future-l1 plan RECIPE [key=value ..]`, with the words of `verl.trainer.main_ppo`.

Says what the run would do and what it needs, and checks all that can be checked before Ray starts: verl's own checks
and ours, attention and vLLM, lengths, the data, and the memory of a GPU in each phase. Weights are not loaded. verl's
entry point cannot carry it: it starts Ray before it asks a trainer for anything.
"""

import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from future_l1_plugin.compat import require
from future_l1_plugin.errors import ConfigError, UserError
from future_l1_plugin.integrations.verl import memory
from future_l1_plugin.integrations.verl.compose import ask_verl, compose, given_values
from future_l1_plugin.integrations.verl.memory import GIB
from future_l1_plugin.integrations.verl.names import VLLM_ROLLOUT
from future_l1_plugin.integrations.verl.settings import Settings, check_attention
from future_l1_plugin.integrations.verl.shape import (
    counts_of,
    hf_config,
    make_setup,
    pass_tokens,
    processor_of,
    way_out,
)

DEFAULT_GPU = 80.0  # GiB


@dataclass
class Plan:
    """What is printed, and what stands in the way of the run."""

    sections: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    has_gpu: bool = False  # what this machine lacks is a problem only where the run can be

    def add(self, title: str, lines: list[str]) -> None:
        self.sections.append("\n".join([f"{title}:", *(f"  {line}" for line in lines)]))


def make_plan(recipe: Path, overrides: list[str], gpu_memory: float | None = None) -> Plan:
    """Everything that a dry run says.

    Args:
        gpu_memory: GiB of a GPU; None = that of the GPU here, or 80.

    Raises:
        ConfigError: the recipe cannot be read, or is refused by verl or by us; nothing else could be told then.
    """
    config, plan = compose(recipe, overrides), Plan()
    Settings.from_config(config)
    ask_verl(config)
    plan.add("resolved values, of the recipe's own keys", given_values(config, recipe, overrides))
    plan.problems += _lengths(config)
    here, gpu_bytes = _machine(config, gpu_memory, plan)
    plan.add("this machine", here)
    try:
        model = hf_config(config)
        counts = counts_of(config, model)
        processor, without = processor_of(config, model)
    except UserError as error:
        plan.problems.append(f"actor_rollout_ref.model.path: {error}")
        return plan
    plan.add("data", list(_data(config, processor, without, plan)))
    setup = make_setup(config, gpu_bytes)
    plan.add("a step", _step(config, counts, processor))
    plan.add("memory a GPU", _memory(config, counts, setup, plan))
    plan.add("other memory", _host(config, counts, setup))
    plan.add("disk", [_disk(config, counts, setup, plan)])
    return plan


def run(recipe: str, overrides: list[str], gpu_memory: float | None = None) -> int:
    """Print the plan. Raises ConfigError, after that, if the run would not start or not fit."""
    plan = make_plan(Path(recipe), overrides, gpu_memory)
    print(f"dry run of {recipe}: nothing is started, no weights are loaded\n")
    print("\n\n".join(plan.sections), flush=True)
    if plan.problems:
        raise ConfigError("would not run:" + "".join(f"\n- {problem}" for problem in plan.problems))
    print("\nfits")
    return 0


def _lengths(config: DictConfig) -> list[str]:
    """Limits that cannot hold a whole sample."""
    data, actor, rollout, ref = config.data, *(config.actor_rollout_ref[name] for name in ("actor", "rollout", "ref"))
    longest = data.max_prompt_length + data.max_response_length
    limits = {"actor_rollout_ref.rollout.max_model_len": rollout.max_model_len}
    if actor.use_dynamic_bsz:
        limits["actor_rollout_ref.actor.ppo_max_token_len_per_gpu"] = actor.ppo_max_token_len_per_gpu
        limits["actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu"] = rollout.log_prob_max_token_len_per_gpu
        if actor.use_kl_loss:
            limits["actor_rollout_ref.ref.log_prob_max_token_len_per_gpu"] = ref.log_prob_max_token_len_per_gpu
    return [
        f"{key} is {limit:,}, but a prompt and its response may have {longest:,} tokens (data.max_prompt_length + "
        f"data.max_response_length). Set {key}={longest} or more, or shorten those"
        for key, limit in limits.items()
        if limit is not None and limit < longest
    ]


def _machine(config: DictConfig, gpu_memory: float | None, plan: Plan) -> tuple[list[str], int]:
    """What is here, and the bytes of a GPU. On a machine with a GPU, what is missing is a problem."""
    import torch

    gpus, lines = torch.cuda.device_count() if torch.cuda.is_available() else 0, []
    plan.has_gpu = gpus > 0
    wanted, nodes = config.trainer.n_gpus_per_node, config.trainer.nnodes
    if config.trainer.device == "cpu" and not gpus:
        import psutil

        total = psutil.virtual_memory().total // wanted
        return [
            f"no GPU, and trainer.device is cpu: {wanted} ranks share its memory, {total / GIB:.1f} GiB each"
        ], total
    if gpus:
        found = min(torch.cuda.get_device_properties(i).total_memory for i in range(gpus))
        lines.append(f"{gpus} x {torch.cuda.get_device_name(0)}, {found / GIB:.1f} GiB; wanted are {nodes} x {wanted}")
        if gpus < wanted and gpu_memory is None:
            plan.problems.append(
                f"trainer.n_gpus_per_node is {wanted}, this machine has {gpus} GPUs. Set it to {gpus}, or plan for "
                "another machine with --gpu-memory GIB"
            )
    else:
        found = int(DEFAULT_GPU * GIB)
        lines.append(f"no GPU; planned for {nodes} x {wanted} with {gpu_memory or DEFAULT_GPU:g} GiB (--gpu-memory)")
    for check in (_vllm, check_attention):
        try:
            check(config)
        except UserError as error:
            if gpus:
                plan.problems.append(str(error))
            else:
                lines.append(f"wanted where the GPUs are: {error}".replace("\n", " "))
    return lines, found if gpu_memory is None else int(gpu_memory * GIB)


def _vllm(config: DictConfig) -> None:
    if config.actor_rollout_ref.rollout.name == VLLM_ROLLOUT:
        require("vllm")


def _data(config: DictConfig, processor: Any, without: str, plan: Plan) -> Iterator[str]:
    from future_l1_plugin.integrations.verl.dataset import LatentRLDataset

    data = config.data
    if processor is None:
        yield f"lengths not checked: {without}"
    for split, files, most in (
        ("training", data.train_files, data.get("train_max_samples", -1)),
        ("validation", data.val_files, data.get("val_max_samples", -1)),
    ):
        files = [files] if isinstance(files, str) else list(files)
        if absent := [file for file in files if not Path(file).is_file()]:
            yield f"{split}: not checked, {absent[0]} is not here"
            continue
        try:
            count = len(LatentRLDataset(files, None, data, processor, most))
        except UserError as error:
            plan.problems.append(f"{split} data: {error}")
            continue
        steps = f", {count // data.train_batch_size:,} steps per epoch" if split == "training" else ""
        yield f"{split}: {count:,} prompts{steps}"
        if split == "training" and count < data.train_batch_size:
            plan.problems.append(
                f"data.train_files hold {count} prompts, fewer than data.train_batch_size={data.train_batch_size}"
            )


def _step(config: DictConfig, m: memory.ModelCounts, processor: Any) -> list[str]:
    """Tokens and bytes, at most."""
    from future_l1_plugin.integrations.verl.pixels import pixel_dtype

    data, actor, rollout = config.data, config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    prompts, n, gpus = data.train_batch_size, rollout.n, config.trainer.n_gpus_per_node * config.trainer.nnodes
    longest, size = data.max_prompt_length + data.max_response_length, pixel_dtype(config).itemsize
    shown = data.max_prompt_length
    lines = [
        f"{prompts} prompts x {n} rollouts, {math.ceil(prompts / actor.ppo_mini_batch_size)} optimiser steps; all "
        "figures at most, and more where groups are replaced",
        f"rollout: {prompts * shown:,} tokens of prompts, {prompts * n * data.max_response_length:,} decoded",
        f"{'old log-probabilities, reference' if actor.use_kl_loss else 'old log-probabilities'} and update: "
        f"{prompts * n * longest:,} tokens each, on each GPU "
        f"{math.ceil(prompts * n * longest / gpus / pass_tokens(config, actor, 'ppo')):,} micro-batches",
    ]
    if processor is not None:
        video = processor.video_processor
        side = video.patch_size * video.merge_size
        most = video.size["longest_edge"] // (video.temporal_patch_size * side**2)
        lines.append(f"a clip has at most {most:,} tokens, by the checkpoint's video processor")
        shown = min(shown, most) if data.future_l1.question_media == "video" else shown
    bytes_ = shown * m.patches * m.patch * size
    # At once: a step's and those asked for anew in a round in which all were filtered, or a batch of a validation.
    refilled = prompts + math.ceil(prompts * config.get("groups", {}).get("refill", 1.5))
    held = max(refilled, data.get("val_batch_size", None) or 0)
    lines.append(
        f"pixels of a prompt: {bytes_ / 2**20:,.0f} MiB ({shown:,} tokens x {m.patches} patches x {m.patch:,} numbers "
        f"of {size} bytes); of a step: {prompts * bytes_ / GIB:,.1f} GiB, once a prompt"
    )
    lines.append(
        f"Ray's object store holds the pixels of at most {held} prompts at once: {held * bytes_ / GIB:,.1f} GiB, in "
        "/dev/shm (Ray spills to disk what does not fit: ray_kwargs.ray_init.object_store_memory, docker's --shm-size)"
    )
    return lines


def _memory(config: DictConfig, m: memory.ModelCounts, s: memory.Setup, plan: Plan) -> list[str]:
    lines = [f"parameters: {m.trained:,} trained, {m.total - m.trained:,} frozen"]
    for name, parts in memory.phases(m, s).items():
        lines.append(f"{name}: {memory.needed(parts) / GIB:.1f} of {s.gpu_bytes / GIB:.1f} GiB")
        lines += [f"  {p.name:<22} {p.bytes / GIB:>8.2f} GiB   {p.formula}" for p in parts]
    e, data, n = s.engine, config.data, config.actor_rollout_ref.rollout.n
    tokens, group = memory.kv_tokens(m, s), data.max_prompt_length + n * data.max_response_length
    lines.append(
        f"KV cache of an engine: {tokens:,} tokens; that is {tokens // e.length} of the longest sequences, or "
        f"{tokens // group} of the longest groups, which share their prompt"
    )
    problems = memory_problems(m, s)
    if problems:
        problems[-1] += f". {way_out(config, m, s)}"
    plan.problems += problems
    return lines


def memory_problems(m: memory.ModelCounts, s: memory.Setup) -> list[str]:
    """What does not fit."""
    problems = []
    if s.engine.pooled and memory.kv_tokens(m, s) < s.engine.length:
        problems.append(
            f"vLLM's KV cache would hold {memory.kv_tokens(m, s):,} tokens, fewer than one sequence of rollout."
            f"max_model_len={s.engine.length:,}, with gpu_memory_utilization={s.engine.utilization:g}"
        )
    over = {
        name: memory.needed(parts) for name, parts in memory.phases(m, s).items() if memory.needed(parts) > s.gpu_bytes
    }
    if over:
        told = ", ".join(f"{name} {size / GIB:.1f} GiB" for name, size in over.items())
        problems.append(f"memory of a GPU ({s.gpu_bytes / GIB:.1f} GiB) is not enough: {told}")
    return problems


def _host(config: DictConfig, m: memory.ModelCounts, s: memory.Setup) -> list[str]:
    ref, nodes = config.actor_rollout_ref.ref.fsdp_config, config.trainer.nnodes
    lines = [f"loading: {s.model_dtype * m.total / GIB:.1f} GiB of the first machine's memory, for rank 0's copy"]
    if s.reference_tokens is not None:
        b = 2 if "16" in str(ref.model_dtype) else 4
        lines.append(f"reference: {b * m.total / nodes / GIB:.1f} GiB of each machine's memory ({b} bytes x all)")
    if s.all_away:
        lines.append(
            f"actor: {s.model_dtype * (m.total + 3 * m.trained) / nodes / GIB:.1f} GiB of each machine's memory"
        )
    agents, cache = config.actor_rollout_ref.rollout.agent.num_workers, config.data.future_l1.frame_cache_mb
    return [*lines, f"decoded frames: {agents} agent-loop workers x {cache} MiB (data.future_l1.frame_cache_mb)"]


def _disk(config: DictConfig, m: memory.ModelCounts, s: memory.Setup, plan: Plan) -> str:
    sizes = memory.checkpoint_bytes(m, s, list(config.actor_rollout_ref.actor.checkpoint.save_contents))
    whole, kept = sum(sizes.values()) / GIB, config.trainer.get("max_actor_ckpt_to_keep", None)
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in sizes.items() if size)
    at_once = "every one is kept (trainer.max_actor_ckpt_to_keep)"
    if kept:  # an old one goes when the new one is whole
        at_once = f"{kept + 1} at a time at most, while one is written: {(kept + 1) * whole:.1f} GiB"
    folder = Path(config.trainer.default_local_dir).absolute()
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free / GIB
    if plan.has_gpu and free < whole and config.trainer.save_freq > 0:
        plan.problems.append(
            f"trainer.default_local_dir: {free:.0f} GiB are free at {folder}, a checkpoint has {whole:.1f} GiB. Name "
            "another folder, or leave some of actor_rollout_ref.actor.checkpoint.save_contents out"
        )
    return f"a checkpoint: {whole:.1f} GiB ({parts}); {at_once}; {free:.0f} GiB are free at {folder}"
