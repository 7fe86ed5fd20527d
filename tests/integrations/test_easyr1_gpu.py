"""Two whole steps of LA-DAPO on EasyR1, through its entry point, on a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "easyr1" / "la_dapo.yaml"


@pytest.mark.gpu
@pytest.mark.easyr1
def test_two_steps(tmp_path):
    pytest.importorskip("flash_attn", reason="EasyR1 loads its models with flash-attention 2")
    from future_l1_plugin.data import make_world
    from future_l1_plugin.model.tiny import copy_micro_base

    world = make_world(tmp_path / "world", test=16, train=16, progress=False)
    overrides = [
        f"data={{train_files: [{world.futurebench}], val_files: [{world.futurebench}], rollout_batch_size: 4}}",
        "data={max_prompt_length: 256, max_response_length: 64, num_workers: 0}",
        f"worker.actor.model.model_path={copy_micro_base(tmp_path / 'base')}",
        "worker.actor.global_batch_size=4",
        "worker.rollout.n=4",
        "algorithm.online_filtering=false",
        "trainer={max_steps: 2, n_gpus_per_node: 1, val_before_train: false, logger: [file]}",
        f"trainer.save_checkpoint_path={tmp_path / 'out'}",
    ]
    command = [sys.executable, "-m", "future_l1_plugin.integrations.easyr1", f"config={RECIPE}", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    first, second, *_ = [json.loads(line) for line in (tmp_path / "out" / "experiment_log.jsonl").open()]
    for step in (first, second):
        assert step["actor"]["grad_norm"] >= 0 and step["actor"]["text"]["ratio_gap_first_max"] < 1e-3
    assert any((tmp_path / "out" / "global_step_2" / "actor").iterdir())
