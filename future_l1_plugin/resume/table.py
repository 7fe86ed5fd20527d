"""The one table of what a resumed run may change: every key of a recipe, in one of three classes. No torch, no host.

First match wins. A key that no rule names changes results: what is new must be put here before it may change. The
table in recipes/resume.md is written from this one (`python -m future_l1_plugin.resume`).
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Any


class Kind(Enum):
    """What a change of a key does to a run that goes on."""

    RESULTS = "refused"  # the rest of the run would not be the run that was started
    COST = "free"  # time, memory, places and reports only
    EXTENDS = "free in one direction, and said"  # more of the same: steps, limits, patience


@dataclass(frozen=True)
class Rule:
    """Keys of one class.

    Attributes:
        keys: patterns; `*` stands for anything within a part of a key, `**` for anything, `{a,b}` for one of these.
        why: what a change does, in half a sentence.
        order: EXTENDS: values that are no numbers, from the narrowest to the widest. Numbers may grow.
        both: EXTENDS: less of it is free, too, because what was done is the same.
        said: told with a change: why it is refused, what it does to the rest, or that a result may move a little.
        same: what two values are compared by; None: by themselves.
    """

    keys: tuple[str, ...]
    kind: Kind
    why: str
    order: tuple[str, ...] = ()
    both: bool = False
    said: str = ""
    same: Callable[[Any], Any] | None = None

    def matches(self, key: str) -> bool:
        return any(_pattern(each).fullmatch(key) for each in self.keys)


def rule_of(host: str, key: str) -> Rule:
    """The rule for a key of `sft`, `verl` or `easyr1`; `UNLISTED` where there is none."""
    return next((rule for rule in TABLES[host] if rule.matches(key)), UNLISTED)


@cache
def _pattern(text: str) -> re.Pattern:
    parts = re.split(r"(\*\*|\*|\{[^}]*\})", text)
    forms = {"**": ".*", "*": r"[^.]*"}
    found = [
        forms.get(part) or (f"({part[1:-1].replace(',', '|')})" if part.startswith("{") else re.escape(part))
        for part in parts
    ]
    return re.compile("".join(found))


def _needed(contents: Any) -> list[str]:
    """What a run goes on from, of verl's `checkpoint.*_contents`."""
    return sorted({"model", "optimizer", "extra"} & set(contents or ()))


UNLISTED = Rule((), Kind.RESULTS, "not in the table")
_ROUNDS = "other kernels or batches round differently: results agree to rounding, not bit for bit"
_LONGER = "a schedule over all steps (cosine, warm-up) is the longer run's from here on"
_LENGTH = "how long the run is"
_PLACE = "where it lies; its content is compared (inputs.json)"
_MEMORY = "time and memory"
_REPORTS = "reports and checkpoints"
_PATIENCE = "how much is tried or borne before the run stops; what stayed within it is the same"
_ORDER = ("raise", "skip")
_JUDGE = "{base_url,api_key_file,timeout_s,max_concurrency,max_retries,backoff_s,max_backoff_s,cache}"

SFT: Sequence[Rule] = (
    Rule(("model", "data.{records,videos}"), Kind.COST, _PLACE),
    Rule(("output", "log.*"), Kind.COST, _REPORTS),
    Rule(("train.{epochs,max_steps}",), Kind.EXTENDS, _LENGTH, said=_LONGER),
    Rule(("eval.patience",), Kind.EXTENDS, _PATIENCE),
    Rule(
        ("eval.{records,videos,every,limit}",),
        Kind.COST,
        _REPORTS,
        said="with eval.patience, early stopping goes by them from here on",
    ),
    Rule(("eval.{prompts,max_new_tokens}",), Kind.COST, _REPORTS),
    Rule(("data.max_length",), Kind.EXTENDS, "longest sample; the records that are used must stay the same ones"),
    Rule(("data.on_bad",), Kind.EXTENDS, "what is left out; the records that are used must stay the same ones", _ORDER),
    Rule(("data.max_failed",), Kind.EXTENDS, _PATIENCE, both=True),
    Rule(
        ("train.micro_batch_size",),
        Kind.COST,
        "memory, at the same batch_size",
        said="a pass is a mean over its own tokens: passes of another size weigh tokens a little otherwise, and draw "
        "other own latents",
    ),
    Rule(("train.gradient_checkpointing",), Kind.COST, _MEMORY),
    Rule(("train.{attn_implementation,packing}",), Kind.COST, "the kernels of attention", said=_ROUNDS),
    Rule(("devices",), Kind.COST, "processes, where each holds everything", said=_ROUNDS),
    Rule(("train.check_memory", "data.{workers,cache_mb}"), Kind.COST, _MEMORY),
    Rule(("sweep.*",), Kind.COST, "which runs are started"),
    Rule(
        ("qwen_vl_finetune.path",),
        Kind.RESULTS,
        "which project's trainer runs; its folder may move",
        same=bool,
    ),
    Rule(
        ("{hf_trainer,qwen_vl_finetune}.deepspeed", "hf_trainer.fsdp", "processes"),
        Kind.RESULTS,
        "what is divided over the GPUs",
        said="a checkpoint is read under the division that wrote it",
    ),
    Rule(("qwen_vl_finetune.arguments", "qwen_vl_finetune.arguments.**"), Kind.RESULTS, "flags of that trainer"),
    Rule(("data.{question_media,spans}",), Kind.RESULTS, "what the model is shown"),
    Rule(("latent.*",), Kind.RESULTS, "the objective"),
    Rule(
        (
            "train.{batch_size,learning_rate,schedule,warmup_ratio,weight_decay,beta2,max_grad_norm,precision}",
            "train.{train_vision,seed}",
            "train.lora.*",
        ),
        Kind.RESULTS,
        "the optimiser's steps",
    ),
)

_WORKER = "actor_rollout_ref"
VERL: Sequence[Rule] = (
    Rule((f"{_WORKER}.model.path", "data.{train_files,val_files}"), Kind.COST, _PLACE),
    Rule(("data.future_l1.video_root", "data.future_l1.video_root.**", "out"), Kind.COST, _PLACE),
    Rule(("trainer.{total_epochs,total_training_steps}",), Kind.EXTENDS, _LENGTH, said=_LONGER),
    Rule(
        ("data.max_prompt_length", f"{_WORKER}.rollout.prompt_length"),
        Kind.EXTENDS,
        "longest prompt; the prompts that are used must stay the same ones",
    ),
    Rule((f"{_WORKER}.rollout.max_model_len",), Kind.EXTENDS, "longest sequence of the engine"),
    Rule(("data.future_l1.on_bad",), Kind.EXTENDS, "what is left out; the prompts used must stay the same", _ORDER),
    Rule(("groups.{max_failed,max_rounds}",), Kind.EXTENDS, _PATIENCE, both=True),
    Rule(("groups.stall_s",), Kind.COST, "how long a rollout is waited for before the run stops"),
    Rule(("rewards.*.judge.on_failure",), Kind.EXTENDS, _PATIENCE, ("raise", "drop_group"), both=True),
    Rule((f"rewards.*.judge.{_JUDGE}",), Kind.COST, "where the judge is and how it is asked"),
    Rule(
        (
            "trainer.{project_name,experiment_name,logger,log_val_generations,rollout_data_dir,validation_data_dir}",
            "trainer.{save_freq,test_freq,max_actor_ckpt_to_keep,max_critic_ckpt_to_keep,default_local_dir}",
            "trainer.{default_hdfs_dir,val_before_train,val_only,resume_mode,resume_from_path,esi_redundant_time}",
            "trainer.{del_local_ckpt_after_load,checkpoint_callback_class,ray_wait_register_center_timeout}",
            f"{_WORKER}.rollout.{{trace,prometheus}}.**",
            f"{_WORKER}.rollout.{{disable_log_stats,val_kwargs}}",
            f"{_WORKER}.rollout.val_kwargs.*",
            "latent.val_policy.*",
            "data.{val_max_samples,val_batch_size,validation_shuffle}",
        ),
        Kind.COST,
        _REPORTS + ", and validation",
    ),
    Rule(
        ("trainer.{nnodes,n_gpus_per_node}", f"{_WORKER}.rollout.{{nnodes,n_gpus_per_node}}"),
        Kind.COST,
        "how the ranks lie on machines; their number is compared",
    ),
    Rule(
        ("ranks",), Kind.RESULTS, "n_gpus_per_node x nnodes", said="a checkpoint is read by as many ranks as wrote it"
    ),
    Rule(
        (f"{_WORKER}.actor.checkpoint.{{save_contents,load_contents}}",),
        Kind.RESULTS,
        "weights, optimiser and state of a checkpoint; hf_model may come and go",
        same=_needed,
    ),
    Rule((f"{_WORKER}.actor.checkpoint.*",), Kind.COST, _REPORTS),
    Rule(
        (
            "trainer.{balance_batch,device}",
            f"{_WORKER}.{{actor,ref,rollout}}.*max_token_len_per_gpu",
            f"{_WORKER}.{{actor,ref,rollout}}.*micro_batch_size",
            f"{_WORKER}.{{actor,ref,rollout}}.*micro_batch_size_per_gpu",
            f"{_WORKER}.{{actor,ref,rollout}}.*use_dynamic_bsz",
            f"{_WORKER}.{{actor,ref}}.fsdp_config.{{param_offload,optimizer_offload,offload_policy}}",
            f"{_WORKER}.{{actor,ref}}.**use_torch_compile",
            f"{_WORKER}.model.{{use_remove_padding,override_config.attn_implementation}}",
            f"{_WORKER}.{{actor,ref}}.use_remove_padding",
            f"{_WORKER}.rollout.{{gpu_memory_utilization,max_num_seqs,max_num_batched_tokens,enforce_eager}}",
            f"{_WORKER}.rollout.{{cudagraph_capture_sizes,enable_chunked_prefill,enable_prefix_caching}}",
            f"{_WORKER}.rollout.{{tensor_model_parallel_size,data_parallel_size}}",
            f"{_WORKER}.rollout.engine_kwargs.**",
        ),
        Kind.COST,
        _MEMORY,
        said=_ROUNDS,
    ),
    Rule(
        (
            f"{_WORKER}.model.{{enable_gradient_checkpointing,enable_activation_offload,use_shm}}",
            f"{_WORKER}.{{actor,ref}}.fsdp_config.{{reshard_after_forward,forward_prefetch,entropy_checkpointing}}",
            f"{_WORKER}.{{actor,ref}}.**entropy_from_logits_chunk*",
            f"{_WORKER}.{{actor,ref}}.entropy_checkpointing",
            f"{_WORKER}.rollout.{{free_cache_engine,load_format,layered_summon,multi_stage_wake_up,enable_sleep_mode}}",
            f"{_WORKER}.rollout.checkpoint_engine.**",
            f"{_WORKER}.rollout.custom",
            f"{_WORKER}.rollout.custom.*",
            f"{_WORKER}.rollout.agent.num_workers",
            f"{_WORKER}.nccl_timeout",
            "data.{dataloader_num_workers,use_shm,filter_overlong_prompts_workers,gen_batch_size}",
            "data.future_l1.frame_cache_mb",
            "reward.num_workers",
            "{ray_kwargs,transfer_queue,global_profiler}.**",
        ),
        Kind.COST,
        _MEMORY,
    ),
    Rule(
        (
            f"{_WORKER}.actor.optim.total_training_steps",
            "**profiler.**",
            "{critic,distillation}.**",
            "**served_model_name",
        ),
        Kind.COST,
        "set by verl, or without effect here",
    ),
    Rule(("data.train_max_samples", "data.{shuffle,seed}"), Kind.RESULTS, "which prompts, and their order"),
    Rule(("latent.**", "rewards", "rewards.**", "groups.*", "algorithm.**"), Kind.RESULTS, "the objective"),
    Rule(("data.**",), Kind.RESULTS, "what the model is asked and shown, and how long it may answer"),
    Rule((f"{_WORKER}.**", "reward.**", "trainer.v1.**"), Kind.RESULTS, "rollouts, and the optimiser's steps"),
)

EASYR1: Sequence[Rule] = (
    Rule(
        ("worker.actor.model.{model_path,tokenizer_path}", "data.{train_files,val_files}"),
        Kind.COST,
        _PLACE,
    ),
    Rule(("data.future_l1.video_root", "data.future_l1.video_root.**"), Kind.COST, _PLACE),
    Rule(("trainer.{total_epochs,max_steps}",), Kind.EXTENDS, _LENGTH, said=_LONGER),
    Rule(
        ("data.max_prompt_length", "worker.rollout.prompt_length"),
        Kind.EXTENDS,
        "longest prompt; the prompts that are used must stay the same ones",
    ),
    Rule(("worker.rollout.max_model_len",), Kind.EXTENDS, "longest sequence of the engine"),
    Rule(("data.future_l1.on_bad",), Kind.EXTENDS, "what is left out; the prompts used must stay the same", _ORDER),
    Rule(("trainer.max_try_make_batch",), Kind.EXTENDS, _PATIENCE, both=True),
    Rule(("rewards.*.judge.on_failure",), Kind.EXTENDS, _PATIENCE, ("raise", "drop_group"), both=True),
    Rule((f"rewards.*.judge.{_JUDGE}",), Kind.COST, "where the judge is and how it is asked"),
    Rule(
        (
            "trainer.{project_name,experiment_name,logger,val_freq,save_freq,save_limit,save_checkpoint_path}",
            "trainer.{load_checkpoint_path,find_last_checkpoint,val_before_train,val_only,val_generations_to_log}",
            "trainer.ray_timeline",
            "data.val_batch_size",
            "worker.rollout.val_override_config",
            "worker.rollout.val_override_config.*",
            "{latent,worker.latent}.val_policy.*",
            "worker.rollout.{disable_log_stats,disable_tqdm}",
        ),
        Kind.COST,
        _REPORTS + ", and validation",
    ),
    Rule(("trainer.{nnodes,n_gpus_per_node}",), Kind.COST, "how the ranks lie on machines; their number is compared"),
    Rule(
        ("ranks",), Kind.RESULTS, "n_gpus_per_node x nnodes", said="a checkpoint is read by as many ranks as wrote it"
    ),
    Rule(
        (
            "worker.actor.micro_batch_size_per_device_for_{update,experience}",
            "worker.ref.micro_batch_size_per_device_for_experience",
            "worker.{actor,ref}.{padding_free,dynamic_batching,use_torch_compile}",
            "worker.{actor,ref}.fsdp.enable_cpu_offload",
            "worker.rollout.{batch_size,gpu_memory_utilization,max_num_batched_tokens,enforce_eager}",
        ),
        Kind.COST,
        _MEMORY,
        said=_ROUNDS,
    ),
    Rule(
        (
            "worker.actor.model.enable_gradient_checkpointing",
            "worker.{actor,ref}.offload.*",
            "worker.reward.num_cpus",
            "data.{num_workers,filter_overlong_prompts_workers}",
            "data.future_l1.frame_cache_mb",
        ),
        Kind.COST,
        _MEMORY,
    ),
    Rule(
        ("worker.actor.optim.training_steps", "worker.critic.**", "algorithm.filter_key"),
        Kind.COST,
        "set by EasyR1, or without effect here",
    ),
    Rule(("trainer.save_model_only", "trainer.critic_warmup"), Kind.RESULTS, "what a run goes on from"),
    Rule(("{latent,worker.latent}.**", "rewards", "rewards.**", "algorithm.*"), Kind.RESULTS, "the objective"),
    Rule(("data.**",), Kind.RESULTS, "which prompts, their order, what is shown, and how long an answer may be"),
    Rule(("worker.**",), Kind.RESULTS, "rollouts, and the optimiser's steps"),
)

TABLES: dict[str, Sequence[Rule]] = {"sft": SFT, "verl": VERL, "easyr1": EASYR1}
NAMES = {"sft": "SFT", "verl": "RL on verl", "easyr1": "RL on EasyR1"}
