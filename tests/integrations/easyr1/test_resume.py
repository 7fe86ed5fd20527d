"""A run that goes on in its folder: the settings and data that it was started with."""

import json

import pytest

pytest.importorskip("verl.trainer.main", reason="needs EasyR1: make test-easyr1 EASYR1=path")

from future_l1_plugin.data.rl import load_prompts
from future_l1_plugin.errors import ConfigError, DataError
from future_l1_plugin.integrations.easyr1.resume import check_same_run

pytestmark = pytest.mark.easyr1


def test_a_run_goes_on_under_its_own_settings_and_on_its_own_data(make_config, world, tmp_path):
    folder, file = tmp_path / "out", tmp_path / "rl.json"
    file.write_text(world.futurebench.read_text())

    def go_on(*overrides):
        config = make_config(
            f"trainer.save_checkpoint_path={folder}",
            f"data.train_files=[{file}]",
            f"data.future_l1.video_root={world.futurebench.parent / 'videos'}",
            *overrides,
        )
        return check_same_run(config, load_prompts([file], world.futurebench.parent / "videos"))

    assert go_on() == []
    assert go_on("worker.actor.optim.lr=1.0e-4") == [], "no checkpoint yet: a new start"
    assert go_on() == []
    (folder / "checkpoint_tracker.json").write_text("{}")
    assert go_on() == []
    said = go_on("trainer.max_steps=3", "trainer.max_try_make_batch=20", "data.max_prompt_length=512")
    assert [line.split(":")[1].strip() for line in said] == [
        "data.max_prompt_length",
        "trainer.max_steps",
        "trainer.max_try_make_batch",
        "worker.rollout.prompt_length",
    ]
    cost = go_on("worker.actor.offload={offload_params: true}", "worker.rollout.batch_size=2")
    assert cost == [
        "going on otherwise: worker.rollout.batch_size: 6 -> 2 (other kernels or batches round differently: results "
        "agree to rounding, not bit for bit)"
    ], "and what was raised before is compared with the start, too"
    for override, key in (
        ("worker.actor.optim.lr=1.0e-4", "worker.actor.optim.lr: 0.001 -> 0.0001"),
        ("latent.weight=0.25", "latent.weight: 0.5 -> 0.25"),
        ("trainer.n_gpus_per_node=2", "ranks: 1 -> 2"),
        ("trainer.max_steps=1", r"trainer.max_steps: 2 -> 1 \(it may be raised, not lowered\)"),
    ):
        with pytest.raises(ConfigError, match=key):
            go_on(override)
    rows = json.loads(file.read_text())
    file.write_text(json.dumps(rows[::-1]))
    with pytest.raises(DataError, match=r"record files \(rl.json was changed\); the records that are used, and their"):
        go_on()
