"""Which groups per step is trained on: the buffer on a real TransferQueue, and group rewards by hand."""

import os
import signal
import threading
import time

import pytest
import torch

pytest.importorskip("verl")

import ray
import transfer_queue as tq
from omegaconf import OmegaConf
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

from future_l1_plugin.errors import ConfigError
from future_l1_plugin.integrations.rl.groups import NotFinite, RolloutError
from future_l1_plugin.integrations.rl.metrics import angle_gaps, log_prob_gaps, span_metrics
from future_l1_plugin.integrations.rl.samples import group_rewards
from future_l1_plugin.integrations.verl.columns import DROPPED
from future_l1_plugin.integrations.verl.correction import weights_of
from future_l1_plugin.integrations.verl.failures import ERROR, FATAL, PROMPT_ID
from future_l1_plugin.integrations.verl.groups import GroupBuffer, rank_metrics, whole_groups
from future_l1_plugin.integrations.verl.keeper import Keeper
from future_l1_plugin.integrations.verl.reward import last_token
from future_l1_plugin.integrations.verl.settings import GroupsSection
from future_l1_plugin.integrations.verl.watch import Asked, Watch
from future_l1_plugin.la_dapo import Rollout, RolloutCorrection
from future_l1_plugin.latent import LatentTokens
from future_l1_plugin.rewards import RewardSet, Sample

TOKENS = LatentTokens(latent=7, start=8, end=9)


@pytest.fixture(scope="module", autouse=True)
def queue():
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    storage = {"num_data_storage_units": 1, "total_storage_size": 1000}
    tq.init(OmegaConf.create({"backend": {"storage_backend": "SimpleStorage", "SimpleStorage": storage}}))
    yield
    tq.close()
    ray.shutdown()


def submit(uid, accuracies=None, status="finished", partition="train", **info):
    """A prompt and its trajectories, as verl's agent loop leaves them; the last session first."""
    tq.kv_put(key=uid, partition_id=partition, tag={"is_prompt": True, "global_steps": 1, "status": status, **info})
    for i in reversed(range(len(accuracies or ()))):
        extra = {"reward_extra_info": {"acc": accuracies[i]} | ({DROPPED: "timeout"} if accuracies[i] is None else {})}
        extra["reward_extra_info"]["acc"] = accuracies[i] or 0.0
        fields = list_of_dict_to_tensordict([{"responses": torch.arange(i + 1), "extra_fields": extra}])
        tags = [{"status": "success", "seq_len": i, "global_steps": 1}]
        tq.kv_batch_put(keys=[f"{uid}_{i}_0"], fields=fields, tags=tags, partition_id=partition)


@pytest.fixture
def clean():
    yield
    for partition, items in (tq.kv_list() or {}).items():
        if items:
            tq.kv_clear(keys=list(items), partition_id=partition)


def buffer(refill_fn=None, filtered=True, **groups):
    return GroupBuffer(
        groups=GroupsSection(**groups),
        filtered=filtered,
        trainer_mode="sync",
        trainer_config={},
        max_off_policy_threshold=None,
        max_off_policy_strategy="drop",
        sampler_kwargs={},
        refill_fn=refill_fn,
    )


@pytest.mark.usefixtures("clean")
def test_groups_are_taken_in_the_order_of_submission():
    for uid in ("000001x000002", "000001x000000", "000001x000001"):
        submit(uid, [1.0, 0.0])
    batch, metrics = buffer().sample(1, "train", 2)
    assert batch.keys == [f"000001x00000{p}_{s}_0" for p in (0, 1) for s in (0, 1)]
    assert metrics == {
        "groups/accuracy": 0.5,
        "groups/rounds": 1,
        "groups/too_easy": 0,
        "groups/too_hard": 0,
        "groups/no_verdict": 0,
        "groups/failed": 0,
        "groups/filtered": 0,
        "groups/surplus": 1,
    }
    assert not [key for key in tq.kv_list("train")["train"] if key.startswith("000001x000002")], "surplus stays"


@pytest.mark.usefixtures("clean")
def test_groups_without_a_signal_are_replaced_by_new_ones():
    submit("a0", [1.0] * 10)  # above 0.9
    submit("a1", [0.0] * 10)  # below 0.1
    submit("a2", [1.0] + [0.0] * 9)  # 0.1: kept
    submit("a3", [None, 1.0, 0.0])  # the judge was silent on one
    asked = []

    def refill(count):
        asked.append(count)
        for i in range(count):
            submit(f"b{i}", [1.0, 0.0])

    batch, metrics = buffer(refill, refill=1.5).sample(1, "train", 3)
    assert asked == [3]  # two are missing, times 1.5
    assert {key.split("_")[0] for key in batch.keys} == {"a2", "b0", "b1"}
    assert (metrics["groups/too_easy"], metrics["groups/too_hard"], metrics["groups/no_verdict"]) == (1, 1, 1)
    assert (metrics["groups/filtered"], metrics["groups/rounds"], metrics["groups/surplus"]) == (3, 2, 1)
    # Of all that was sampled and judged: 1, 0 and 0.1 in the first round, three times 0.5 in the second.
    assert metrics["groups/accuracy"] == pytest.approx((1 + 0 + 0.1 + 3 * 0.5) / 6)


@pytest.mark.usefixtures("clean")
def test_without_the_filter_only_groups_without_a_verdict_go():
    submit("a0", [1.0, 1.0])
    submit("a1", [None, 1.0])
    batch, metrics = buffer(filtered=False).sample(1, "train", 1)
    assert {key.split("_")[0] for key in batch.keys} == {"a0"}
    assert metrics["groups/no_verdict"] == 1


@pytest.mark.usefixtures("clean")
def test_starving_stops_with_the_reasons():
    submit("a0", [1.0, 1.0])
    rounds = []

    def refill(count):
        rounds.append(count)
        submit(f"r{len(rounds)}", [0.0, 0.0])

    with pytest.raises(RolloutError, match="after 3 rounds of sampling 0 of 1 groups") as error:
        buffer(refill, max_rounds=3).sample(1, "train", 1)
    assert "1 were too easy (mean accuracy above 0.9), 2 too hard (below 0.1)" in str(error.value)
    assert len(rounds) == 2


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize("partition", ["train", "val"])
def test_a_failed_rollout_stops_the_run_with_its_message(partition):
    submit("a0", [1.0, 0.0], partition=partition)
    submit("a1", status="failure", partition=partition, **{ERROR: "RewardError: term 'mine' gave nan", FATAL: True})
    with pytest.raises(RolloutError, match=r"1 of the step's prompts .* RewardError: term 'mine' gave nan"):
        buffer().sample(1, partition, 1)


def fail(uid, reason, partition="train"):
    submit(uid, status="failure", partition=partition, **{ERROR: reason, PROMPT_ID: f"prompt-{uid}"})


@pytest.mark.usefixtures("clean")
def test_a_prompt_that_fails_by_its_own_fault_is_named_and_replaced(caplog):
    submit("a0", [1.0, 0.0])
    fail("a1", "clip.mp4: frame 3 does not come out")
    submit("a1", [1.0], status="failure")  # a session that ended before its sibling failed
    cleared, asked = [], []

    def refill(count):
        asked.append(count)
        for i in range(count):
            submit(f"b{i}", [1.0, 0.0])

    buffered = buffer(refill, refill=1.0)
    buffered.on_clear = cleared.append
    batch, metrics = buffered.sample(1, "train", 2)
    assert asked == [1]
    assert {key.split("_")[0] for key in batch.keys} == {"a0", "b0"}
    assert (metrics["groups/failed"], metrics["groups/filtered"], metrics["groups/rounds"]) == (1, 0, 2)
    assert cleared == [{"a1"}]
    assert "prompt prompt-a1 was dropped: clip.mp4: frame 3 does not come out" in caplog.text
    assert not [key for key in tq.kv_list("train")["train"] if key.startswith("a1")]


@pytest.mark.usefixtures("clean")
def test_too_many_failures_in_a_step_stop_the_run():
    for i in range(2):
        fail(f"a{i}", "too long")

    def refill(count):
        fail("b0", "broken")

    with pytest.raises(
        RolloutError, match=r"3 prompts of the step failed, groups.max_failed is 2[^\n]*\n  prompt-b0: broken"
    ):
        buffer(refill, max_failed=2).sample(1, "train", 1)


@pytest.mark.usefixtures("clean")
def test_validation_goes_on_without_a_prompt_that_fails():
    submit("a0", [1.0], partition="val")
    fail("a1", "broken", partition="val")
    batch, _ = buffer().sample(1, "val", 2)
    assert batch.keys == ["a0_0_0"]
    fail("a2", "broken", partition="val")
    with pytest.raises(RolloutError, match="all 1 questions of a batch of the validation failed"):
        buffer().sample(1, "val", 1)


def test_ranks_get_whole_groups():
    keys = [f"{uid}_{session}_0" for session in (1, 0) for uid in ("d", "a", "c", "b")]
    lengths = [{"a": 10, "b": 30, "c": 28, "d": 12}[key[0]] for key in keys]
    order = whole_groups(keys, lengths, 2)
    shares = [[keys[i] for i in order[:4]], [keys[i] for i in order[4:]]]
    # The longest and the shortest on one rank, the two in between on the other; siblings side by side, in order.
    assert sorted(shares) == [["a_0_0", "a_1_0", "b_0_0", "b_1_0"], ["c_0_0", "c_1_0", "d_0_0", "d_1_0"]]
    assert sorted(order) == list(range(8))
    assert whole_groups(keys, lengths, 1) is None
    assert whole_groups(keys, lengths, 3) is None
    assert whole_groups(keys[:-1], lengths[:-1], 2) is None


def test_ranks_of_a_group_by_hand():
    keys = ["a_0_0", "a_1_0", "b_0_0", "b_1_0"]
    found = {"actor/ranks_per_group": 1.0, "global_seqlen/balanced_min": 30, "global_seqlen/balanced_max": 70}
    assert rank_metrics(keys, [10, 20, 30, 40], 2) == found
    mixed = rank_metrics(["a_0_0", "b_0_0", "a_1_0", "b_1_0"], [10, 30, 20, 40], 2)
    assert mixed == {"actor/ranks_per_group": 2.0, "global_seqlen/balanced_min": 40, "global_seqlen/balanced_max": 60}


@pytest.mark.usefixtures("clean")
def test_weights_go_to_the_samples_that_they_belong_to():
    """Through the queue, in another order than that of submission, with ratios that differ by sample and position."""
    from types import SimpleNamespace

    from transfer_queue import KVBatchMeta

    from future_l1_plugin.integrations.verl.trainer import LaDapoTrainer

    drawn = {"a_0_0": [0.0, -0.1, -0.2], "b_0_0": [-0.3], "c_0_0": [-0.4, -0.5]}
    fields = [
        {
            "responses": torch.tensor([1, TOKENS.latent, 2][: len(values)]),
            "response_mask": torch.ones(len(values), dtype=torch.long),
            "rollout_log_probs": torch.tensor(values, dtype=torch.float64) - 1,
            "old_log_probs": torch.full((len(values),), -1.0, dtype=torch.float64),
        }
        for values in drawn.values()
    ]
    tags = [{"status": "success", "global_steps": 1}] * 3
    tq.kv_batch_put(keys=list(drawn), fields=list_of_dict_to_tensordict(fields), tags=tags, partition_id="train")
    keys, metrics = ["c_0_0", "a_0_0", "b_0_0"], {"rollout_corr/kl": 1.0}
    trainer = SimpleNamespace(settings=SimpleNamespace(correction=RolloutCorrection(upper=1.45)), tokens=TOKENS)
    LaDapoTrainer._correct(trainer, KVBatchMeta(partition_id="train", keys=keys, tags=tags), metrics)
    for key, values in drawn.items():
        found = tq.kv_batch_get(keys=[key], partition_id="train", select_fields=["rollout_is_weights"])
        # old - rollout = -value: exp of it, at most 1.45 (exp(0.4) is 1.49).
        expected = torch.tensor([-v for v in values]).exp().clamp(max=1.45)
        assert torch.allclose(next(iter(found["rollout_is_weights"].unbind())).float(), expected), key
    assert metrics["rollout_correction/text_truncated"] == pytest.approx(1 / 4)
    assert "rollout_corr/kl" not in metrics


@pytest.mark.usefixtures("clean")
def test_validation_takes_everything():
    submit("a0", [1.0], partition="val")
    submit("a1", [0.0], partition="val")
    batch, metrics = buffer().sample(1, "val", 2)
    assert len(batch.keys) == 2
    assert metrics == {}


def sample(name, ids, latents, correct=None):
    latents = torch.tensor(latents, dtype=torch.float32).reshape(-1, 2)
    return Sample(
        text="",
        response_ids=torch.tensor(ids),
        latents=latents,
        span=torch.arange(len(latents)),
        ground_truth="A",
        sample_id=name,
        max_response_length=10,
        correct=correct,
    )


def test_group_rewards_by_hand():
    rewards = RewardSet.from_config(
        [{"term": "accuracy", "weight": 0.9}, {"term": "r_ctr", "weight": 0.2, "temperature": 0.5}]
    )
    # Two prompts, mixed. In p: x right along e1, y right along e1, z wrong along e2. In q: one rollout alone.
    samples = [sample("x", [8, 7, 9], [1, 0]), sample("q", [8, 7, 9], [1, 0]), sample("y", [8, 7, 9], [2, 0])]
    samples.append(sample("z", [8, 7, 9], [0, 1]))
    scores = [{"accuracy": a} for a in (1.0, 1.0, 1.0, 0.0)]
    found = group_rewards(rewards, samples, scores, ["p", "q", "p", "p"])
    # x: positive y at similarity 1, negative z at 1/2. z: its best positive at 1/2, no other negative. q: nobody.
    e = torch.tensor([2.0, 1.0]).exp()
    r_x = float(e[0] / (e[0] + e[1]))
    assert found.terms["r_ctr"] == pytest.approx([r_x, 0.0, r_x, 1.0])
    assert found.totals == pytest.approx([0.9 + 0.2 * r_x, 0.9, 0.9 + 0.2 * r_x, 0.2])


def test_the_reward_stands_on_the_last_token():
    assert last_token(0.5, 3).tolist() == [0.0, 0.0, 0.5]


def test_span_metrics_by_hand():
    samples = [
        sample("a", [1, 8, 7, 7, 9, 1, 8, 7, 9], [1, 0, 1, 0, 0, 1]),  # two spans, of 2 and 1
        sample("b", [1, 2], []),
        sample("c", [8, 7], [1, 0]),  # unclosed
        sample("d", [8, 9, 3], []),  # empty
    ]
    object.__setattr__(samples[0], "span", torch.tensor([0, 0, 1]))
    assert span_metrics(samples, TOKENS) == {
        "latent/spans_per_response": 1.0,
        "latent/latents_per_span": 1.0,
        "latent/responses_with_span": 0.75,
        "latent/adjacent_cosine": 0.0,
    }


def rollouts(responses, masks, log_probs):
    none = torch.empty(0, 4)
    return [Rollout(*row, none) for row in zip(responses, [mask.bool() for mask in masks], log_probs, strict=True)]


def test_log_prob_gaps_by_hand():
    responses = [torch.tensor([1, 7, 9]), torch.tensor([7])]
    masks = [torch.tensor([1, 1, 0]), torch.tensor([1])]  # the end marker was forced
    rollout = [torch.tensor([-1.0, 5.0, 0.0]), torch.tensor([3.0])]
    actor = [torch.tensor([-1.5, 5.0, -9.0]), torch.tensor([3.5])]
    assert log_prob_gaps(rollouts(responses, masks, rollout), actor, TOKENS) == {
        "rollout_gap/text_mean": 0.5,
        "rollout_gap/text_p50": 0.5,
        "rollout_gap/text_p99": 0.5,
        "rollout_gap/text_max": 0.5,
        "rollout_gap/latent_mean": 0.25,
        "rollout_gap/latent_p50": 0.0,
        "rollout_gap/latent_p99": 0.5,
        "rollout_gap/latent_max": 0.5,
    }


def test_gaps_have_quantiles_and_angles():
    """A hundred and one tokens that differ by 0, 1, .. 100 nats; the same as angles, in two rows."""
    values = torch.arange(101.0)[torch.randperm(101, generator=torch.Generator().manual_seed(0))]
    expected = {"mean": 50.0, "p50": 50.0, "p99": 99.0, "max": 100.0}
    ones = torch.ones(101).long()
    gaps = log_prob_gaps(rollouts([ones], [ones], [values]), [torch.zeros(101)], TOKENS)
    assert gaps == {f"rollout_gap/text_{key}": value for key, value in expected.items()}
    angles = angle_gaps([values[:40, None], torch.zeros(0, 1), values[40:, None]])
    assert angles == {f"rollout_gap/angle_{key}": value for key, value in expected.items()}
    assert angle_gaps([torch.zeros(0, 1)]) == {}


def test_weights_of_text_and_latents_by_hand():
    """p_actor / p_rollout of a text, a latent, a forced marker and another latent: 2, e, -, 1/2, cut at 2."""
    responses = [torch.tensor([1, 7, 9]), torch.tensor([7])]
    masks = [torch.tensor([1, 1, 0]), torch.tensor([1])]
    rollout = [torch.tensor([-1.0, 1000.0, 0.0]).double(), torch.tensor([3.0]).double()]
    actor = [rollout[0] + torch.tensor([2.0, 2.718281828, 1.0]).log(), rollout[1] + torch.tensor([0.5]).log()]
    weights, metrics = weights_of(RolloutCorrection(upper=2.1), rollouts(responses, masks, rollout), actor, TOKENS)
    assert [row.tolist() for row in weights] == [pytest.approx([2.0, 2.1, 0.0]), pytest.approx([0.5])]
    assert metrics == pytest.approx(
        {
            "rollout_correction/text_mean": 2.0,
            "rollout_correction/text_truncated": 0.0,
            "rollout_correction/latent_mean": 1.3,
            "rollout_correction/latent_truncated": 0.5,
        }
    )


@pytest.fixture
def worker():
    """An actor and its process."""
    actor = ray.remote(Keeper).options(num_cpus=0).remote()
    yield actor, ray.get(actor.__ray_call__.remote(lambda self: os.getpid()))
    ray.kill(actor)


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize("partition", ["train", "val"])
def test_a_worker_that_is_killed_ends_the_wait_with_its_prompts(worker, partition):
    actor, process = worker
    submit("a0", [1.0], partition=partition)
    submit("a1", status="running", partition=partition)
    submit("a2", status="pending", partition=partition)
    waiting = buffer(stall_s=None)
    waiting.watch = Watch({"agent-loop worker 0": actor}, {"a1": Asked("clip-7", "agent-loop worker 0")})
    kill = threading.Timer(1.0, os.kill, (process, signal.SIGKILL))  # it has answered once by then
    kill.start()
    started = time.monotonic()
    with pytest.raises(
        RolloutError, match=r"agent-loop worker 0 died: .*2 prompts are waited for: clip-7 \(agent-loop"
    ):
        waiting.sample(1, partition, 3)
    assert 1 <= time.monotonic() - started < 15


@pytest.mark.usefixtures("clean")
def test_a_worker_that_is_busy_is_not_taken_for_dead(worker):
    actor, _ = worker
    watch = Watch({"agent-loop worker 0": actor}, {})
    actor.__ray_call__.remote(lambda self: time.sleep(2))
    for _ in range(3):
        watch._next = 0.0
        watch.check(["a1"])


@pytest.mark.usefixtures("clean")
def test_a_stall_ends_the_wait_and_names_the_prompts():
    submit("a0", status="running")
    submit("a1", status="running")
    waiting = buffer(stall_s=1.5)
    waiting.watch = Watch(
        {}, {"a0": Asked("clip-7", "agent-loop worker 1"), "a1": Asked("clip-8", "agent-loop worker 0")}
    )
    later = threading.Timer(1.0, submit, ("a1", [1.0]))  # an end within the limit: it begins anew
    later.start()
    started = time.monotonic()
    said = r"no rollout of the step came to its end for 1.5 s \(groups.stall_s\). 1 prompts are waited for: clip-7"
    with pytest.raises(RolloutError, match=said):
        waiting.sample(1, "train", 2)
    assert time.monotonic() - started > 2.4


def test_a_stall_limit_is_checked():
    with pytest.raises(ConfigError, match=r"groups\.stall_s: expected seconds above 0, or null"):
        GroupsSection(stall_s=0)


def test_a_step_that_is_not_finite_stops_before_anything_is_saved(monkeypatch):
    """verl's own reduction of its workers' figures, of two updates, one of them without a finite gradient."""
    from types import SimpleNamespace

    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
    from verl.utils.metric import reduce_metrics

    from future_l1_plugin.integrations.verl.trainer import LaDapoTrainer

    figures = {"actor/grad_norm": [0.5, 0.7], "actor/loss": [0.1, 0.2]}

    def update(self, batch, metrics):
        metrics.update(reduce_metrics({key: list(values) for key, values in figures.items()}))
        return batch

    monkeypatch.setattr(PPOTrainerSync, "_update_actor", update)
    trainer = object.__new__(LaDapoTrainer)
    trainer._pixels = ray.remote(Keeper).options(num_cpus=0).remote()
    trainer.global_steps = 7
    trainer._asked = {"a0": Asked("clip-7", ""), "a1": Asked("clip-8", "")}
    batch = SimpleNamespace(keys=["a1_0_0", "a0_0_0", "a0_1_0"], extra_info={})
    metrics = {}
    assert trainer._update_actor(batch, metrics) is batch
    assert metrics["actor/grad_norm"] == pytest.approx(0.6)
    for name in figures:
        for value in (float("nan"), float("inf")):
            sound, figures[name][0] = figures[name][0], value
            said = rf"step 7: .*{name} {value}.*Its prompts: clip-8, clip-7\. The same command"
            with pytest.raises(NotFinite, match=said):
                trainer._update_actor(batch, metrics)
            figures[name][0] = sound
