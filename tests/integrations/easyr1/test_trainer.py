"""Groups, filter and training loop with one worker in this process, and with answers' accuracies from a list."""

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("verl.trainer.main", reason="needs EasyR1: make test-easyr1 EASYR1=path")

import ray
from verl.protocol import DataProto
from verl.trainer.ray_trainer import compute_advantage

from future_l1_plugin.errors import ConfigError
from future_l1_plugin.integrations.easyr1.dataset import create_dataloaders
from future_l1_plugin.integrations.easyr1.reward import LatentRewardManager
from future_l1_plugin.integrations.easyr1.trainer import LaDapoTrainer
from future_l1_plugin.integrations.easyr1.worker import LatentFSDPWorker, _Base
from future_l1_plugin.integrations.rl.groups import RolloutError

pytestmark = pytest.mark.easyr1

N = 4  # rollouts per prompt


@pytest.fixture(scope="module")
def cluster():
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


class LocalWorkers:
    """A worker group of one worker in this process."""

    world_size = 1

    def __init__(self, worker):
        self._worker = worker

    def __getattr__(self, name):
        return getattr(self._worker, name)

    def save_checkpoint(self, path, save_model_only=False):
        """EasyR1's writes CUDA's state."""
        Path(path).mkdir(parents=True)


class Rewards:
    """Rewards as the reward manager gives them, with accuracies from a list in place of the answers'."""

    def __init__(self, tokenizer, rewards, correct):
        self.manager, self.correct, self.compute_reward = LatentRewardManager(rewards, tokenizer), correct, self

    def remote(self, data):
        _, columns = asyncio.run(self.manager.compute_reward(data))
        columns["acc"] = [float(self.correct.pop(0)) for _ in range(len(data))]
        columns["overall"] = [c + 0.1 * i for i, c in enumerate(columns["acc"])]
        totals = torch.zeros(data.batch["responses"].shape)
        totals[:, 0] = torch.tensor(columns["overall"])
        return ray.put((totals, columns))


def make_trainer(config, worker, rewards):
    train, val = create_dataloaders(config.data, worker.processor)
    trainer = LaDapoTrainer(
        config,
        tokenizer=worker.tokenizer,
        processor=worker.processor,
        train_dataloader=train,
        val_dataloader=val,
        role_worker_mapping={},
        resource_pool_manager=None,
        reward_fn=rewards,
        val_reward_fn=rewards,
    )
    trainer.actor_rollout_ref_wg = LocalWorkers(worker)
    trainer.data_iterator = iter(train)
    trainer.global_step = 0
    return trainer


def test_filtering_goes_on_after_an_empty_round(worker, make_config, decoded, cluster):
    config = make_config()
    easy, hard, mixed = [1] * N, [0] * N, [1, 0] * (N // 2)
    rewards = Rewards(worker.tokenizer, config.rewards, [*easy, *hard, *mixed, *easy, *mixed, *mixed])
    trainer, metrics = make_trainer(config, worker, rewards), {}
    worker.prepare_rollout_engine()
    batch = trainer._make_batch_data(metrics)
    worker.release_rollout_engine()
    assert rewards.correct == [], "three rounds of two prompts"
    assert {k: v for k, v in metrics.items() if k.startswith("groups/")} == {
        "groups/accuracy": pytest.approx(14 / 24),
        "groups/rounds": 3,
        "groups/too_easy": 2,
        "groups/too_hard": 1,
        "groups/no_verdict": 0,
        "groups/surplus": 1,
    }
    assert len(batch) == 2 * N and len(set(batch.non_tensor_batch["uid"])) == 2
    assert metrics["groups/accuracy"] == pytest.approx(14 / 24)
    assert metrics["reward/overall"] == pytest.approx(0.5 + 0.1 * sum(range(N)) / N)  # of the two groups trained on
    assert batch.batch["token_level_scores"].sum(1).tolist() == pytest.approx(
        [c + 0.1 * i for i, c in enumerate(mixed)] * 2
    )


def test_a_starved_step_says_why(worker, make_config, cluster):
    config = make_config("trainer.max_try_make_batch=1")
    trainer = make_trainer(config, worker, Rewards(worker.tokenizer, config.rewards, [1] * N + [0] * N))
    with pytest.raises(
        RolloutError,
        match=r"after 1 rounds of sampling 0 of 2 groups can be trained on: 1 were too easy \(.*\), 1 too hard",
    ):
        trainer._make_batch_data({})


def test_two_steps_of_easyr1s_training_loop(worker, make_config, decoded, cluster, monkeypatch):
    config = make_config()
    trainer = make_trainer(config, worker, Rewards(worker.tokenizer, config.rewards, [1, 0] * 40))
    monkeypatch.setattr(worker.flops_counter, "estimate_flops", lambda *args: (0.0, 1.0))
    trainer.resource_pool_manager = SimpleNamespace(get_num_gpus=lambda: 1)
    trainer.fit()
    log = Path(config.trainer.save_checkpoint_path) / "experiment_log.jsonl"
    first, second, validation = [json.loads(line) for line in log.read_text().splitlines()]
    for step in (first, second):
        assert step["groups"]["rounds"] == 1 and step["groups"]["accuracy"] == 0.5
        assert step["latent"]["latents_per_span"] > 1
        for part in ("text", "latent"):
            assert step["rollout_gap"][f"{part}_max"] < 1e-4  # what was sampled is what is scored
            assert step["actor"][part]["ratio_gap_first_max"] < 1e-5
    assert first["actor"]["text"]["kl_ref"] == first["actor"]["latent"]["kl_ref"] == 0
    assert second["actor"]["text"]["kl_ref"] > 1e-6 and second["actor"]["latent"]["kl_ref"] > 1e-6
    assert validation["val"]["acc_reward"] == 0.5


def test_old_checkpoints_go_when_the_new_one_is_whole(worker, make_config, tmp_path, monkeypatch, capsys):
    """EasyR1 removes them first, and a run killed in its save then starts from nothing."""
    config = make_config(f"trainer={{save_checkpoint_path: {tmp_path}, save_limit: 1}}")
    tracker = tmp_path / "checkpoint_tracker.json"

    def trainer(step):
        found = make_trainer(config, worker, None)
        found.global_step = step
        return found

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    def resumed():
        found = trainer(0)
        monkeypatch.setattr(LocalWorkers, "load_checkpoint", lambda self, path: None, raising=False)
        found._load_checkpoint()
        return found

    trainer(1)._save_checkpoint()
    trainer(2)._save_checkpoint()
    assert [path.name for path in sorted(tmp_path.glob("global_step_*"))] == ["global_step_2"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("verl.trainer.ray_trainer.torch.save", killed)
        trainer(3)._save_checkpoint()
    again = resumed()
    assert again.global_step == 2
    assert f"passed over {tmp_path}/global_step_3: its saving did not come to an end" in capsys.readouterr().out
    written = (tmp_path / "global_step_2" / "dataloader.pt").stat().st_mtime_ns
    again._save_checkpoint()  # nothing was trained since
    assert (tmp_path / "global_step_2" / "dataloader.pt").stat().st_mtime_ns == written
    again.global_step = 3
    again._save_checkpoint()
    both = ["global_step_2", "global_step_3"]  # EasyR1 keeps the best beside the last: the first of equal scores
    assert [path.name for path in sorted(tmp_path.glob("global_step_*"))] == both
    tracker.write_text(tracker.read_text()[:20])  # killed while EasyR1 wrote it
    assert resumed().global_step == 3 and json.loads(tracker.read_text())["last_global_step"] == 3
    (tmp_path / "global_step_3" / "dataloader.pt").unlink()
    assert resumed().global_step == 2
    (tmp_path / "global_step_2" / "dataloader.pt").unlink()
    assert resumed().global_step == 0 and not tracker.exists()
    assert "training starts from its beginning" in capsys.readouterr().out


def test_fewer_prompts_than_a_batch_are_told_before_anything_starts(worker, make_config):
    data = make_config("data={rollout_batch_size: 64}").data
    with pytest.raises(ConfigError, match=r"data.rollout_batch_size: expected at most the \d+ prompts .* found 64"):
        create_dataloaders(data, worker.processor)
    data.mini_rollout_batch_size = 2
    assert len(create_dataloaders(data, worker.processor)[0]) > 0


def test_the_advantage_is_la_dapos(worker):
    data = DataProto.from_dict(
        tensors={
            "token_level_rewards": torch.tensor([[0.0, 1.0], [0.3, 0.0], [0.0, 0.3]]),
            "response_mask": torch.ones(3, 2),
        },
        non_tensors={"uid": np.array(["a", "b", "b"], dtype=object)},
    )
    found = compute_advantage(data, "grpo").batch["advantages"]
    assert found[1:].tolist() == [[0.0, 0.0]] * 2  # exactly: EasyR1's own leaves a rounding error over 1e-6


def test_the_workers_process_keeps_our_methods():
    """EasyR1 takes the first base of the actor's class for the process that holds it."""
    assert ray.remote(LatentFSDPWorker).__ray_actor_class__.__base__ is _Base
    assert "init_model" not in vars(_Base)
