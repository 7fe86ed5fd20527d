"""What we rely on in verl beyond its public interface, by name: a new verl that moves one fails here, not in a run."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("verl")

from verl.experimental.agent_loop import agent_loop
from verl.trainer.ppo.v1 import agent_loop_tq, get_trainer_cls
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
from verl.trainer.ppo.v1.trainer_base import PPOTrainer
from verl.workers.engine import EngineRegistry, FSDPEngineWithLMHead
from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker
from verl.workers.rollout.base import get_rollout_class
from verl.workers.rollout.replica import get_rollout_replica_class

import future_l1_plugin.integrations.verl.trainer as ours
from future_l1_plugin.integrations.verl import host, names

SEAMS = [
    (PPOTrainer._compute_old_log_prob, "self, batch, metrics"),
    (PPOTrainer._compute_ref_log_prob, "self, batch, metrics"),
    (PPOTrainer._compute_advantage, "self, batch, metrics"),
    (PPOTrainer._update_actor, "self, batch, metrics"),
    (PPOTrainer._fetch_one_gen_batch, "self"),
    (PPOTrainer._build_replay_buffer, "self"),
    (PPOTrainer._init_resource_pool_mgr, "self"),
    (PPOTrainer._init_tokenizer, "self"),
    (PPOTrainer._init_dataloader, "self"),
    (PPOTrainer._load_checkpoint, "self"),
    (PPOTrainer._save_checkpoint, "self"),
    (PPOTrainer.fit, "self, agent_loop_manager"),
    (PPOTrainer._log_rollout_data, "self, batch, timing_raw, rollout_data_dir"),
    (PPOTrainer._dump_generations, "self, inputs, outputs, gts, scores, reward_extra_infos_dict, dump_path"),
    (agent_loop_tq.AgentLoopManagerTQ.generate_sequences, "self, prompts"),
    (
        PPOTrainer._val_metrics_update,
        "self, data_sources, sample_uids, reward_extra_infos_dict, sample_turns, expected_acc_counts",
    ),
    (ReplayBuffer.sample, "self, global_steps, partition_id, batch_size"),
    (ReplayBuffer._clear_groups, "self, partition_id, uids"),
    (ReplayBuffer._sync_metadata_from_transfer_queue, "self"),
    (ReplayBuffer._materialize_batch, "self, partition_id, selected_prompt_uids, partition_snapshot"),
    (FSDPEngineWithLMHead.prepare_model_inputs, "self, micro_batch"),
    (FSDPEngineWithLMHead.prepare_model_outputs, "self, output, output_args, micro_batch, logits_processor_func"),
    (FSDPEngineWithLMHead.forward_step, "self, micro_batch, loss_function, forward_only"),
    (FSDPEngineWithLMHead.forward_backward_batch, "self, data, loss_function, forward_only"),
    (FSDPEngineWithLMHead._build_module, "self"),
    (FSDPEngineWithLMHead._build_fsdp_module, "self, module"),
    (FSDPEngineWithLMHead.get_per_tensor_param, "self, layered_summon, base_sync_done, kwargs"),
    (FSDPEngineWithLMHead._merged_lora_per_tensor_param, "self"),
    (FSDPEngineWithLMHead.optimizer_step, "self"),
    (TrainingWorker.train_mini_batch, "self, data"),
    (TrainingWorker.infer_batch, "self, data"),
    (ActorRolloutRefWorker.init_model, "self"),
    (agent_loop.AgentLoopWorker._compute_multi_modal_inputs, "self, output, input_ids"),
    (
        agent_loop.AgentLoopWorker._compute_position_ids,
        "self, input_ids, attention_mask, multi_modal_inputs, mm_processor_kwargs",
    ),
]


def test_every_name_of_the_table_is_in_verl():
    """But for vLLM's part of it, where vLLM is not installed."""
    for name, place in host.NAMES.items():
        if "vllm" not in place:
            assert getattr(host, name) is not None
    with pytest.raises(ImportError):
        from future_l1_plugin.integrations.verl.host import not_in_the_table  # noqa: F401


def test_nothing_else_imports_verl():
    folder = Path(host.__file__).parent
    found = {
        path.name: line
        for path in folder.glob("*.py")
        for line in path.read_text().splitlines()
        if line.strip().startswith(("from verl", "import verl"))
    }
    assert not found


@pytest.mark.parametrize(("function", "parameters"), SEAMS, ids=lambda x: getattr(x, "__qualname__", ""))
def test_a_seam_is_where_it_was(function, parameters):
    names = [
        name for name in inspect.signature(function).parameters if name != "_ray_trace_ctx"
    ]  # Ray adds it to actors
    assert ", ".join(names) == parameters


def test_what_the_worker_s_start_does():
    """`LatentAgentLoopWorker.__init__` repeats these lines: see there."""
    source = inspect.getsource(agent_loop_tq.AgentLoopWorkerTQ.__ray_actor_class__.__init__).split("\n", 1)[1]
    assert [line.strip() for line in source.splitlines() if line.strip()] == [
        "super().__init__(*args, **kwargs)",
        "tq.init()",
        "self.background_tasks = set()",
    ]


def test_names_in_recipes_lead_to_our_classes():
    assert get_trainer_cls(names.TRAINER) is ours.LaDapoTrainer
    assert EngineRegistry.get_engine_cls("language_model", names.ENGINE).__name__ == "LatentEngine"
    assert get_rollout_class(names.ROLLOUT).__name__ == "LatentHFAdapter"
    assert get_rollout_replica_class(names.ROLLOUT).__name__ == "LatentHFReplica"
    assert agent_loop._agent_loop_registry[names.AGENT_LOOP]["_target_"].endswith("agent_loop.LatentAgentLoop")
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn

    assert get_adv_estimator_fn(names.ADVANTAGE).__module__.endswith("verl.advantage")


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)


def test_verl_alone_loads_nothing_of_ours_but_the_registrations():
    done = python(
        "import verl, sys\nprint(sorted(m for m in sys.modules if m.startswith('future_l1_plugin.integrations.verl.')))"
    )
    assert done.returncode == 0, done.stderr
    loaded = done.stdout.splitlines()[0]
    assert "plugin" in loaded
    assert "trainer" not in loaded and "engine" not in loaded and "rollout" not in loaded


def test_a_wrong_verl_says_so():
    """verl itself logs a plugin that fails at DEBUG, and goes on."""
    done = python("from future_l1_plugin import compat\ncompat.installed = lambda name: ('verl', '0.8.0')\nimport verl")
    assert done.returncode == 0
    assert "future_l1_plugin could not register with verl" in done.stderr
    assert "0.8.0" in done.stderr and "verl[verl-core]==0.9.1" in done.stderr


def test_verl_s_own_platform_is_kept_where_it_is_named():
    done = python(
        "import os; os.environ['VERL_PLATFORM'] = 'nvidia'\n"
        "import verl\n"
        "from verl.plugin.platform import get_platform\n"
        "print(get_platform().device_name)"
    )
    assert done.stdout.split()[-1] == "cuda", done.stderr
