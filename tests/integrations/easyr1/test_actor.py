"""The actor on a fixed batch, held against what the verl integration makes of it (`reference.json`)."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("verl.trainer.main", reason="needs EasyR1: make test-easyr1 EASYR1=path")

from verl.protocol import DataProto

from future_l1_plugin.integrations.easyr1 import actor as module
from future_l1_plugin.integrations.easyr1.actor import EXTRA, REF_MU, ROLLOUT, STEP, object_array
from future_l1_plugin.integrations.rl.groups import NotFinite
from future_l1_plugin.la_dapo import Rollout

pytestmark = pytest.mark.easyr1

REFERENCE = json.loads(Path(__file__).with_name("reference.json").read_text())


def reference_batch(**more):
    """The batch of the reference file, in EasyR1's layout."""
    found = REFERENCE["rows"]
    longest, width = (max(len(row[key]) for row in found) for key in ("prompt", "response"))

    def right(key, dtype=torch.long):
        return torch.stack(
            [torch.nn.functional.pad(torch.tensor(row[key], dtype=dtype), (0, width - len(row[key]))) for row in found]
        )

    left = [longest - len(row["prompt"]) for row in found]
    pad = torch.nn.functional.pad
    prompts = torch.stack([pad(torch.tensor(row["prompt"]), (n, 0)) for row, n in zip(found, left, strict=True)])
    lengths = torch.tensor([len(row["response"]) for row in found])
    mask = torch.cat(
        [torch.arange(longest) >= torch.tensor(left)[:, None], torch.arange(width) < lengths[:, None]], 1
    ).long()

    def vectors(seed, row):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(row["response"].count(452), 128, generator=generator)

    def rollout(i, row):
        actions = torch.tensor(row["mask"]).bool()
        log_probs = torch.tensor(row["old_log_probs"], dtype=torch.float64) + 0.01
        return Rollout(torch.tensor(row["response"]), actions, log_probs, vectors(i, row))

    data = DataProto.from_dict(
        tensors={
            "input_ids": torch.cat([prompts, right("response")], 1),
            "responses": right("response"),
            "response_mask": right("mask"),
            "attention_mask": mask,
            "position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, None].expand(-1, 4, -1).contiguous(),
            "old_log_probs": right("old_log_probs", torch.float64),
            "ref_log_probs": right("ref_log_probs", torch.float64),
            "advantages": torch.tensor([row["advantage"] for row in found])[:, None].expand(-1, width).contiguous(),
        },
        non_tensors={
            ROLLOUT: object_array([rollout(i, row) for i, row in enumerate(found)]),
            REF_MU: object_array([vectors(100 + i, row) for i, row in enumerate(found)]),
            EXTRA: object_array([{"id": f"q{i // 2}"} for i in range(len(found))]),
        },
        meta_info={"temperature": REFERENCE["temperature"], STEP: 7},
    )
    return data


@pytest.fixture
def actor(make_worker, make_config):
    settings = REFERENCE["settings"]
    config = make_config(
        f"algorithm.kl_coef={settings['kl_weight']}",
        f"latent.kl_weight={settings['latent_kl_weight']}",
        f"worker.actor.clip_ratio_high={settings['clip_high']}",
    )
    return make_worker(config).actor


@pytest.mark.parametrize("dynamic", [False, True])
def test_log_probs_are_those_of_the_verl_integration(actor, dynamic):
    actor.config.dynamic_batching, actor.config.micro_batch_size_per_device_for_experience = dynamic, 2
    found = actor.compute_log_prob(reference_batch())
    for row, values in zip(REFERENCE["rows"], found, strict=True):
        chosen = torch.tensor(row["mask"]).bool()
        got, expected = values[: len(chosen)], torch.tensor(row["log_probs"], dtype=torch.float64)
        torch.testing.assert_close(got[chosen], expected[chosen], atol=1e-4, rtol=0)
    assert [len(mu) for mu in actor.mu] == [row["response"].count(452) for row in REFERENCE["rows"]]


def test_mu_keeps_the_order_of_the_rows_whatever_the_micro_batches(actor):
    actor.config.micro_batch_size_per_device_for_experience = 1
    actor.compute_log_prob(reference_batch())
    one_by_one = actor.mu
    actor.config.dynamic_batching = True
    actor.compute_log_prob(reference_batch())
    for a, b in zip(one_by_one, actor.mu, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_update_is_that_of_the_verl_integration(actor, micro_batch):
    data = reference_batch()
    actor.config.global_batch_size_per_device = len(data)
    text, latent = actor._masks(data.batch)
    inputs = {**data.batch, **data.non_tensor_batch}
    loss = actor._la_dapo(inputs, REFERENCE["temperature"], int(text.sum()), int(latent.sum())).loss
    assert loss.item() == pytest.approx(REFERENCE["loss"], abs=1e-4)
    actor.actor_optimizer.zero_grad()
    actor.config.micro_batch_size_per_device_for_update = micro_batch
    metrics = actor.update_policy(data)
    assert metrics["actor/grad_norm"] == [pytest.approx(REFERENCE["grad_norm"], rel=1e-3)]
    assert metrics["rollout_gap/text_max"] == metrics["rollout_gap/latent_max"] == [pytest.approx(0.01)]
    parts = {"text/pg_loss": 1, "latent/pg_loss": 0.5, "text/kl_ref": 0.05, "latent/kl_ref": 0.2}
    assert sum(metrics[f"actor/{k}"][0] * w for k, w in parts.items()) == pytest.approx(REFERENCE["loss"], abs=1e-4)


def test_without_a_reference_there_is_no_kl(make_worker, make_config):
    actor, data = make_worker(make_config("algorithm.disable_kl=true")).actor, reference_batch()
    del data.batch["ref_log_probs"], data.non_tensor_batch[REF_MU]
    actor.config.global_batch_size_per_device = len(data)
    metrics = actor.update_policy(data)
    assert metrics["actor/grad_norm"][0] > 0 and not [name for name in metrics if "kl_ref" in name]


def test_latents_of_another_rollout_are_refused(actor):
    data = reference_batch()
    rollouts = data.non_tensor_batch[ROLLOUT]
    rollouts[2] = replace(rollouts[2], latents=rollouts[2].latents[1:])
    with pytest.raises(ValueError, match=r"has 10 <\|latent\|> ids, its rollout brought 9 latents"):
        actor.compute_log_prob(data)


def test_a_loss_or_gradient_that_is_not_finite_ends_the_run(actor, monkeypatch):
    """EasyR1 prints a line and goes on."""
    data = reference_batch()
    actor.config.global_batch_size_per_device = len(data)
    before = [weight.clone() for weight in actor.actor_module.parameters()]
    data.batch["advantages"][2] = float("inf")
    with pytest.raises(NotFinite, match=r"step 7: expected a finite loss of an update, found (nan|-?inf) .* q0, q1\."):
        actor.update_policy(data)
    data = reference_batch()
    weight = next(weight for weight in actor.actor_module.parameters() if weight.requires_grad)
    hook = weight.register_hook(lambda grad: grad * float("nan"))
    with pytest.raises(NotFinite, match="step 7: expected a finite gradient norm of an update, found nan"):
        actor.update_policy(data)
    hook.remove()
    assert all(torch.equal(a, b) for a, b in zip(actor.actor_module.parameters(), before, strict=True))
    # A rank whose own loss is finite stops with the one whose loss is not.
    others = SimpleNamespace(
        ReduceOp=torch.distributed.ReduceOp,
        all_reduce=lambda tensor, op: tensor.fill_(1.0),
        get_world_size=lambda: 2,
        all_gather_object=lambda found, own: found.__setitem__(slice(None), [own, (float("nan"), ["q8"])]),
    )
    monkeypatch.setattr(module, "dist", others)
    with pytest.raises(NotFinite, match=r"found 0.5, nan \(one a rank\). Its prompts: q0, q1, q8\."):
        actor._check_finite("loss", 0.5, data, torch.device("cpu"))
