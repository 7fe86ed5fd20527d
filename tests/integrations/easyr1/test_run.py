"""The command as a user types it: real Ray, worker processes, validation, checkpoints, and going on from one."""

import json

import pytest

pytest.importorskip("verl.trainer.main", reason="needs EasyR1: make test-easyr1 EASYR1=path")

import ray

from future_l1_plugin.integrations.easyr1.__main__ import main

pytestmark = [pytest.mark.easyr1, pytest.mark.slow]

#: The micro base is never right: its responses differ in how they repeat themselves.
REWARDS = "rewards=[{term: accuracy, weight: 0.9}, {term: r_ctr, weight: 0.2}, {term: repetition, weight: 1.0, n: 1}]"


def test_two_steps_and_the_second_again(arguments, tmp_path):
    command = [
        *arguments,
        REWARDS,
        "algorithm.online_filtering=false",
        "data.shuffle=true",
        "worker.actor.model.override_config={force_initial_latent_mode: true}",  # it opens no span by itself
        f"trainer={{val_freq: 2, save_freq: 1, save_checkpoint_path: {tmp_path}}}",
    ]

    def run():
        ray.init(num_cpus=4, num_gpus=1, include_dashboard=False, log_to_driver=False)  # as many as it asks for
        main(command)
        ray.shutdown()
        return [json.loads(line) for line in (tmp_path / "experiment_log.jsonl").open()]

    first, second = run()
    for step in (first, second):
        assert 0 < step["rollout_gap"]["text_max"] < 1e-3 and 0 < step["rollout_gap"]["latent_max"] < 1e-3
        assert step["actor"]["grad_norm"] > 0 and step["latent"]["spans_per_response"] == 1
    assert first["actor"]["latent"]["kl_ref"] == 0 < second["actor"]["latent"]["kl_ref"]
    assert "val" in second and "val" not in first

    tracker = tmp_path / "checkpoint_tracker.json"
    tracker.write_text(json.dumps(json.loads(tracker.read_text()) | {"last_global_step": 1}))  # killed before step 2
    (again,) = run()
    for step in (second, again):
        for name in ("perf", "timing_s", "timing_per_token_ms"):
            del step[name]
    assert again == second
