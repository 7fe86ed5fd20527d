"""Every import of verl: what is taken from it, and where it lies. A version that moves something changes this table.

    from future_l1_plugin.integrations.verl.host import AgentLoopBase

Names are looked up when they are asked for, because each of verl's modules is slow to import (8 s together) and several
import one another. `plugin` names the modules after whose import ours are loaded.
"""

from importlib import import_module
from typing import Any

#: Name -> "module:attribute"; a module itself has no attribute.
NAMES = {
    "AgentLoopBase": "verl.experimental.agent_loop.agent_loop:AgentLoopBase",
    "AgentLoopMetrics": "verl.experimental.agent_loop.agent_loop:AgentLoopMetrics",
    "AgentLoopOutput": "verl.experimental.agent_loop.agent_loop:AgentLoopOutput",
    "AgentLoopWorker": "verl.experimental.agent_loop.agent_loop:AgentLoopWorker",
    "RewardManagerBase": "verl.experimental.reward_loop.reward_manager.base:RewardManagerBase",
    "PlatformBase": "verl.plugin.platform:PlatformBase",
    "PlatformRegistry": "verl.plugin.platform:PlatformRegistry",
    "get_platform": "verl.plugin.platform:get_platform",
    "set_platform": "verl.plugin.platform:set_platform",
    "Dispatch": "verl.single_controller.base.decorator:Dispatch",
    "register": "verl.single_controller.base.decorator:register",
    "register_adv_est": "verl.trainer.ppo.core_algos:register_adv_est",
    "Role": "verl.trainer.ppo.utils:Role",
    "need_critic": "verl.trainer.ppo.utils:need_critic",
    "need_reference_policy": "verl.trainer.ppo.utils:need_reference_policy",
    "AgentLoopManagerTQ": "verl.trainer.ppo.v1.agent_loop_tq:AgentLoopManagerTQ",
    "AgentLoopWorkerTQ": "verl.trainer.ppo.v1.agent_loop_tq:AgentLoopWorkerTQ",
    "ReplayBuffer": "verl.trainer.ppo.v1.replay_buffer:ReplayBuffer",
    "register_trainer": "verl.trainer.ppo.v1.trainer_base:register_trainer",
    "PPOTrainerSync": "verl.trainer.ppo.v1.trainer_sync:PPOTrainerSync",
    "validate_config": "verl.utils.config:validate_config",
    "get_device_id": "verl.utils.device:get_device_id",
    "get_device_name": "verl.utils.device:get_device_name",
    "copy_to_local": "verl.utils.fs:copy_to_local",
    "_select_fsdp2_wrap_targets": "verl.utils.fsdp_utils:_select_fsdp2_wrap_targets",
    "merged_lora_context": "verl.utils.fsdp_utils:merged_lora_context",
    "normalize_peft_param_name": "verl.utils.fsdp_utils:normalize_peft_param_name",
    "AggregationType": "verl.utils.metric:AggregationType",
    "Metric": "verl.utils.metric:Metric",
    "convert_weight_keys": "verl.utils.model:convert_weight_keys",
    "simple_timer": "verl.utils.profiler:simple_timer",
    "calculate_workload": "verl.utils.seqlen_balancing:calculate_workload",
    "get_seqlen_balanced_partitions": "verl.utils.seqlen_balancing:get_seqlen_balanced_partitions",
    "tu": "verl.utils.tensordict_utils",
    "PrecisionType": "verl.utils.torch_dtypes:PrecisionType",
    "drop_tied_target_keys": "verl.utils.transformers_compat:drop_tied_target_keys",
    "RolloutConfig": "verl.workers.config:RolloutConfig",
    "EngineRegistry": "verl.workers.engine:EngineRegistry",
    "FSDPEngineWithLMHead": "verl.workers.engine:FSDPEngineWithLMHead",
    "unfuse_moe_params": "verl.workers.engine.fsdp.utils:unfuse_moe_params",
    "ActorRolloutRefWorker": "verl.workers.engine_workers:ActorRolloutRefWorker",
    "TrainingWorker": "verl.workers.engine_workers:TrainingWorker",
    "BaseRollout": "verl.workers.rollout.base:BaseRollout",
    "LLMServerClient": "verl.workers.rollout.llm_server:LLMServerClient",
    "RolloutReplica": "verl.workers.rollout.replica:RolloutReplica",
    "TokenOutput": "verl.workers.rollout.replica:TokenOutput",
    "ensure_async_iterator": "verl.workers.rollout.utils:ensure_async_iterator",
    "vLLMColocateWorkerExtension": "verl.workers.rollout.vllm_rollout.utils:vLLMColocateWorkerExtension",
    "vLLMHttpServer": "verl.workers.rollout.vllm_rollout.vllm_async_server:vLLMHttpServer",
    "vLLMReplica": "verl.workers.rollout.vllm_rollout.vllm_async_server:vLLMReplica",
    "no_padding_2_padding": "verl.workers.utils.padding:no_padding_2_padding",
}


def __getattr__(name: str) -> Any:
    if name not in NAMES:
        raise AttributeError(f"{__name__}: no {name}; add it to NAMES")
    module, _, attribute = NAMES[name].partition(":")
    found = import_module(module)
    return getattr(found, attribute) if attribute else found
