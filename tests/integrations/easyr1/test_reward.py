"""The reward manager on finished responses."""

import asyncio

import numpy as np
import pytest
import torch
from rl_rows import a_prompt, rollout_of

pytest.importorskip("verl.trainer.main", reason="needs EasyR1: make test-easyr1 EASYR1=path")

from transformers import AutoTokenizer
from verl.protocol import DataProto

from future_l1_plugin.integrations.easyr1.actor import ROLLOUT, object_array
from future_l1_plugin.integrations.easyr1.dataset import PROMPT
from future_l1_plugin.integrations.easyr1.reward import LatentRewardManager

pytestmark = pytest.mark.easyr1


@pytest.fixture(scope="module")
def tokenizer(base):
    return AutoTokenizer.from_pretrained(base)


def row_of(name, **changes):
    choice = {"ground_truth": "A", "options": {"A": "up", "B": "down"}, "kind": "choice"}
    return {"rl_prompt": a_prompt(name, **{**choice, **changes}).to_dict()}


def finished(tokenizer, answers, latents, **columns):
    """A batch of finished responses, one latent span each."""
    texts = [f"<reason>so</reason><|latent_start|><|latent|><|latent_end|><answer>{a}</answer>" for a in answers]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] for text in texts]
    width = max(map(len, ids)) + 2
    pad = torch.nn.functional.pad
    return DataProto.from_dict(
        tensors={
            "responses": torch.stack([pad(torch.tensor(row), (0, width - len(row))) for row in ids]),
            "attention_mask": torch.stack([pad(torch.ones(3 + len(row)).long(), (0, width - len(row))) for row in ids]),
        },
        non_tensors={
            ROLLOUT: object_array(
                [rollout_of(torch.tensor(row), torch.tensor([z])) for row, z in zip(ids, latents, strict=True)]
            ),
            PROMPT: object_array([row_of(f"q{i // 2}") for i in range(len(ids))]),
            **columns,
        },
    )


def test_rewards_of_groups_by_hand(tokenizer):
    """r_ctr of a right response: e^(s+/tau) / (e^(s+/tau) + e^(s-/tau)), s = (1 + cos) / 2; tau 0.5."""
    rewards = [
        {"term": "accuracy", "weight": 0.9},
        {"term": "r_ctr", "weight": 0.2, "temperature": 0.5},
        {"term": "r_div", "weight": 0.1},
    ]
    right, wrong = [1.0, 0.0], [0.0, 1.0]
    uid = np.array(["x", "x", "x", "y"], dtype=object)
    data = finished(tokenizer, "AABB", [right, right, wrong, wrong], uid=uid)
    totals, columns = asyncio.run(LatentRewardManager(rewards, tokenizer).compute_reward(data))
    assert columns["acc"] == columns["accuracy"] == [1, 1, 0, 0]
    near, far = np.exp(1 / 0.5), np.exp(0.5 / 0.5)
    # The wrong one's nearest right one is at cosine 0, and no other is wrong.
    assert columns["r_ctr"] == pytest.approx([near / (near + far)] * 2 + [1.0, 0.0])
    assert columns["r_div"] == [0.0] * 4  # one span each
    assert columns["overall"] == pytest.approx([0.9 + 0.2 * near / (near + far)] * 2 + [0.2, 0.0])
    lengths = data.batch["attention_mask"][:, 3:].sum(1)
    assert totals.sum(1).tolist() == pytest.approx(columns["overall"])
    assert totals[torch.arange(4), lengths - 1].tolist() == pytest.approx(columns["overall"])


def test_a_group_without_a_verdict_has_no_reward(tokenizer):
    judge = {"base_url": "http://127.0.0.1:9/v1", "model": "m", "on_failure": "drop_group", "max_retries": 0}
    data = finished(tokenizer, "AABB", [[1.0, 0.0]] * 4)
    for i in (2, 3):
        data.non_tensor_batch[PROMPT][i] = row_of(
            f"q{i // 2}", ground_truth="it falls off the table", kind="text", options=None
        )
    manager = LatentRewardManager([{"term": "accuracy", "weight": 1.0, "judge": judge}], tokenizer)
    _, columns = asyncio.run(manager.compute_reward(data))  # no uid: groups by prompt
    assert columns["no_verdict"] == [0, 0, 1, 1]
    assert columns["overall"] == [1, 1, 0, 0]
