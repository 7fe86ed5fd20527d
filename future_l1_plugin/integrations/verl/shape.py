"""What a configuration of verl means for `memory`: counts of its model, sizes of its passes, and ways out."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from future_l1_plugin.errors import CheckpointError
from future_l1_plugin.integrations.verl.memory import Engine, ModelCounts, Setup, kv_tokens, needed, phases
from future_l1_plugin.integrations.verl.names import VLLM_ROLLOUT
from future_l1_plugin.integrations.verl.settings import attention

_WORKER = "actor_rollout_ref"


def hf_config(config: DictConfig) -> Any:
    """The model's configuration, with what `override_config` says. Raises CheckpointError: there is none."""
    from transformers import AutoConfig

    from future_l1_plugin.model.backbone import by_config

    path = config.actor_rollout_ref.model.path
    try:
        found = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: no checkpoint here, and the hub did not give it ({str(error).strip().splitlines()[0]})"
        ) from error
    by_config(found, path)
    for key, value in config.actor_rollout_ref.model.override_config.items():
        setattr(found, key, value)
    return found


def processor_of(config: DictConfig, model: Any) -> tuple[Any, str]:
    """The checkpoint's processor; None, and why, where the folder has a configuration alone.

    Raises CheckpointError: a tokenizer that does not belong to the configuration.
    """
    from future_l1_plugin.model.checkpoint import load_processor
    from future_l1_plugin.model.config import LatentConfig

    path = config.actor_rollout_ref.model.path
    if Path(path).is_dir() and not (Path(path) / "tokenizer_config.json").is_file():
        return None, f"{path} holds no tokenizer"
    return load_processor(path, LatentConfig.from_hf(model)), ""


def counts_of(config: DictConfig, model: Any) -> ModelCounts:
    """Counts of the model as verl builds, freezes, adapts and shards it, from its configuration alone.

    Raises CheckpointError: the configuration has no latent tokens.
    """
    import torch

    from future_l1_plugin.integrations.verl.host import _select_fsdp2_wrap_targets
    from future_l1_plugin.integrations.verl.lora import embeddings_in_the_outermost_unit
    from future_l1_plugin.model.backbone import by_config, core_of, patches_per_token
    from future_l1_plugin.model.checkpoint import attach_head
    from future_l1_plugin.model.config import LatentConfig
    from future_l1_plugin.model.training import stored_dtype

    given, latent = config.actor_rollout_ref.model, LatentConfig.from_hf(model)
    with torch.device("meta"):
        module = by_config(model).model.load()(model)
        attach_head(module, latent)
    frozen = config.actor_rollout_ref.actor.get("freeze_vision_tower", False)
    if frozen:
        core_of(module).vision.requires_grad_(False)
    if given.get("lora_rank", 0):
        module = _adapted(module, given, frozen)
    names = getattr(module, "_no_split_modules", None)
    how = embeddings_in_the_outermost_unit(module.config) if given.get("lora_rank", 0) else nullcontext()
    with how:
        units = [sum(p.numel() for p in unit.parameters()) for unit in _select_fsdp2_wrap_targets(module, list(names))]
    total = sum(p.numel() for p in module.parameters())
    text, vision = model.text_config, model.vision_config
    return ModelCounts(
        total=total,
        trained=sum(p.numel() for p in module.parameters() if p.requires_grad),
        largest_unit=max(units),
        outside_units=total - sum(units),
        largest_tensor=max(p.numel() for p in module.parameters()),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        inner=text.intermediate_size,
        queries=text.num_attention_heads * text.head_dim,
        keys=text.num_key_value_heads * text.head_dim,
        vocabulary=text.vocab_size,
        vision_layers=vision.depth,
        vision_hidden=vision.hidden_size,
        vision_inner=vision.intermediate_size,
        patches=patches_per_token(model),
        patch=vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
        stored=(stored_dtype(model) or torch.float32).itemsize,
    )


def _adapted(module: Any, given: DictConfig, frozen: bool) -> Any:
    """With LoRA's adapters, as verl's engine and our worker ask PEFT for them."""
    from omegaconf import OmegaConf
    from peft import LoraConfig, get_peft_model

    from future_l1_plugin.integrations.verl.lora import add_rows
    from future_l1_plugin.model.backbone import vision_pattern

    targets, left_out = given.target_modules, given.exclude_modules
    if frozen:
        left_out = vision_pattern() + (f"|{left_out}" if left_out else "")
    if OmegaConf.is_config(targets):
        targets = OmegaConf.to_container(targets)
    lora = LoraConfig(r=given.lora_rank, target_modules=targets, exclude_modules=left_out, bias="none")
    adapted = get_peft_model(module, lora, low_cpu_mem_usage=True)
    add_rows(adapted)
    return adapted


def make_setup(config: DictConfig, gpu_bytes: int) -> Setup:
    """The run's settings, as `memory` takes them."""
    worker = config.actor_rollout_ref
    actor, rollout, fsdp = worker.actor, worker.rollout, worker.actor.fsdp_config
    mixed = fsdp.get("mixed_precision", None) or {}
    gpus, flash = config.trainer.n_gpus_per_node * config.trainer.nnodes, attention(config) == "flash_attention_2"
    sleeps = rollout.free_cache_engine and rollout.get("enable_sleep_mode", True)
    chunked, lora = fsdp.entropy_from_logits_with_chunking, worker.model.get("lora_rank", 0) > 0
    return Setup(
        gpus=fsdp.fsdp_size if fsdp.fsdp_size > 0 else gpus,
        gpu_bytes=gpu_bytes,
        tokens=pass_tokens(config, actor, "ppo"),
        old_tokens=pass_tokens(config, rollout, "log_prob"),
        reference_tokens=pass_tokens(config, worker.ref, "log_prob") if actor.use_kl_loss and not lora else None,
        checkpointing=worker.model.enable_gradient_checkpointing,
        model_dtype=_bytes(fsdp.model_dtype),
        param_dtype=_bytes(mixed.get("param_dtype", "bf16")),
        reduce_dtype=_bytes(mixed.get("reduce_dtype", "fp32")),
        weights_away=fsdp.param_offload,
        optimizer_away=fsdp.optimizer_offload,
        all_away=fsdp.offload_policy,
        flash=flash,
        packed=worker.model.use_remove_padding,
        scaled=rollout.temperature != 1,
        entropy="chunked" if chunked else "compiled" if fsdp.use_torch_compile else "plain",
        entropy_trained=actor.calculate_entropy or actor.entropy_coeff != 0,
        vision_frozen=bool(actor.get("freeze_vision_tower", False)),
        engine=Engine(
            sleeps=bool(rollout.name == VLLM_ROLLOUT and sleeps),
            pooled=rollout.name == VLLM_ROLLOUT,
            utilization=rollout.gpu_memory_utilization,
            dtype=_bytes(rollout.dtype),
            parallel=rollout.tensor_model_parallel_size,
            sequences=rollout.max_num_seqs,
            length=rollout.max_model_len or config.data.max_prompt_length + config.data.max_response_length,
            batched=rollout.max_num_batched_tokens,
            bucket=rollout.checkpoint_engine.update_weights_bucket_megabytes * 2**20,
        ),
    )


def pass_tokens(config: DictConfig, section: DictConfig, name: str) -> int:
    """Tokens of a micro-batch, at most: verl fills it by tokens, or with a number of samples of any length.

    section, name: the section whose keys are `NAME_max_token_len_per_gpu` and `NAME_micro_batch_size_per_gpu`.
    """
    dynamic = section.use_dynamic_bsz if name == "ppo" else section.log_prob_use_dynamic_bsz
    if dynamic:
        return section[f"{name}_max_token_len_per_gpu"]
    longest = config.data.max_prompt_length + config.data.max_response_length
    return longest * (section[f"{name}_micro_batch_size_per_gpu"] or 1)


def way_out(config: DictConfig, m: ModelCounts, s: Setup) -> str:
    """The keys that would make it fit, each tried on the same arithmetic."""
    tried = dict(_changes(config, s))
    for size in (1, 2, 3):
        found = [keys for keys in combinations(tried, size) if _fits(m, _changed(s, [tried[key] for key in keys]))]
        if found:
            return "It would fit with " + ", or with ".join(" ".join(keys) for keys in found[:4])
    return "No key of FSDP, length or rollout makes it fit: take more or larger GPUs, or a smaller model"


def _changes(config: DictConfig, s: Setup) -> Iterator[tuple[str, dict[str, Any]]]:
    """What a user can set, and what it changes. `engine.` fields are the engine's."""
    trainer, data, fsdp = config.trainer, config.data, f"{_WORKER}.actor.fsdp_config"
    if config.actor_rollout_ref.actor.fsdp_config.fsdp_size <= 0:
        for gpus in (2, 4, 8, 16, 32, 64):
            if gpus > s.gpus:
                nodes = f" trainer.nnodes={gpus // 8}" if gpus > 8 else ""
                yield f"trainer.n_gpus_per_node={min(gpus, 8)}{nodes}", {"gpus": gpus}
                if trainer.nnodes == 1 and gpus >= 8:
                    break
    longest = data.max_prompt_length + data.max_response_length
    if s.tokens > longest and config.actor_rollout_ref.actor.use_dynamic_bsz:
        fewer = {"tokens": longest, "old_tokens": longest}
        fewer |= {"reference_tokens": longest} if s.reference_tokens is not None else {}
        yield f"{_WORKER}.actor.ppo_max_token_len_per_gpu={longest}", fewer
    if not s.checkpointing:
        yield f"{_WORKER}.model.enable_gradient_checkpointing=true", {"checkpointing": True}
    if not s.optimizer_away:
        yield f"{fsdp}.optimizer_offload=true", {"optimizer_away": True}
    if not s.all_away:
        yield f"{fsdp}.offload_policy=true", {"all_away": True}
    if not s.engine.pooled:
        for sequences in (64, 32, 16, 8):
            if sequences < s.engine.sequences:
                yield f"{_WORKER}.rollout.max_num_seqs={sequences}", {"engine.sequences": sequences}
        return
    if not s.engine.sleeps:
        yield f"{_WORKER}.rollout.free_cache_engine=true", {"engine.sleeps": True}
    for share in (0.4, 0.5, 0.6, 0.7, 0.8):
        if abs(share - s.engine.utilization) > 0.01:
            yield f"{_WORKER}.rollout.gpu_memory_utilization={share}", {"engine.utilization": share}


def _changed(s: Setup, changes: list[dict[str, Any]]) -> Setup:
    for change in changes:
        of_engine = {key.removeprefix("engine."): value for key, value in change.items() if key.startswith("engine.")}
        own = {key: value for key, value in change.items() if not key.startswith("engine.")}
        s = replace(s, **own, engine=replace(s.engine, **of_engine))
    return s


def _fits(m: ModelCounts, s: Setup) -> bool:
    fits = all(needed(parts) <= s.gpu_bytes for parts in phases(m, s).values())
    return fits and (not s.engine.pooled or kv_tokens(m, s) >= s.engine.length)


def _bytes(dtype: Any) -> int:
    return 2 if "16" in str(dtype) else 4
