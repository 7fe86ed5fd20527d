"""Rollouts that verl writes down keep their spans and say their lengths. No Ray: the queue is stood in for."""

import asyncio
import json
import types

import pytest
import torch
from rl_rows import a_prompt, rollout_of
from tensordict import NonTensorData, NonTensorStack, TensorDict

pytest.importorskip("verl")

import transfer_queue as tq

from future_l1_plugin.integrations.verl.columns import ROLLOUT
from future_l1_plugin.integrations.verl.dumps import facts, is_told, is_wanted, with_markers
from future_l1_plugin.integrations.verl.reward import LatentRewardManager
from future_l1_plugin.integrations.verl.trainer import LaDapoTrainer
from future_l1_plugin.latent import LatentTokens
from future_l1_plugin.rewards import RewardSet

MARKED = "it <|latent_start|><|latent|><|latent|><|latent_end|> falls <|latent_start|><|latent_end|><answer>B</answer>"


@pytest.fixture(scope="module")
def tokenizer(tiny_path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_path)


def ids_of(tokenizer, text):
    return torch.tensor([*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id])


def config(**trainer):
    from omegaconf import OmegaConf

    rewards = [{"term": "accuracy", "weight": 0.9}, {"term": "format", "weight": 0.1}]
    return OmegaConf.create({"trainer": trainer, "data": {"max_response_length": 64}, "rewards": rewards})


def scored(tokenizer, config, text):
    """What the reward worker says of a response: verl's data of one trajectory, padded."""
    ids = ids_of(tokenizer, text)
    manager = object.__new__(LatentRewardManager)
    manager.tokenizer, manager.tokens = tokenizer, LatentTokens.from_tokenizer(tokenizer)
    manager.rewards = RewardSet.from_config(list(map(dict, config.rewards)))
    manager.max_response_length, manager.with_text = 64, is_wanted(config)
    fields = {
        "response_len": len(ids),
        "tool_extra_fields": {ROLLOUT: rollout_of(ids, torch.zeros(int((ids == manager.tokens.latent).sum()), 4))},
        "rl_prompt": a_prompt("a", ground_truth="B", kind="choice", options={"A": "left", "B": "right"}).to_dict(),
    }
    padded = torch.nn.functional.pad(ids, (0, 9), value=tokenizer.pad_token_id)
    item = types.SimpleNamespace(batch={"responses": padded}, non_tensor_batch=fields)
    return asyncio.run(manager.run_single([item]))["reward_extra_info"]


def test_what_the_reward_worker_says(tokenizer):
    said = scored(tokenizer, config(rollout_data_dir="somewhere"), MARKED)
    words = len(tokenizer(MARKED, add_special_tokens=False)["input_ids"])
    assert (said["response_tokens"], said["response_spans"], said["response_latents"]) == (words + 1, 2, 2)
    assert said["response_text"] == MARKED and said["acc"] == 1.0
    quiet = scored(tokenizer, config(), MARKED)
    assert "response_text" not in quiet and quiet["response_latents"] == 2


def test_an_unclosed_span_counts():
    tokens = LatentTokens(latent=7, start=8, end=9)
    sample = types.SimpleNamespace(response_ids=torch.tensor([1, 8, 7, 9, 2, 8, 7, 7]), text="t")
    assert facts(sample, tokens, True) == {
        "response_tokens": 8,
        "response_spans": 2,
        "response_latents": 3,
        "response_text": "t",
    }
    assert with_markers(["a", "b"], {"response_text": ["c", None], "uid": [1, 2]}) == (["c", "b"], {"uid": [1, 2]})


def test_of_lengths_the_mean_is_a_metric():
    names = ["val-core/a/acc/mean@2", "val-aux/a/response_tokens/mean@2", "val-aux/a/response_tokens/best@2/mean"]
    assert [is_told(name) for name in names] == [True, True, False]


def test_the_files_of_training_and_validation(tokenizer, tmp_path, monkeypatch):
    texts = [MARKED, "no span <answer>A</answer>"]
    infos = [scored(tokenizer, config(rollout_data_dir="x"), text) for text in texts]
    keys = ["000003x000000_0_0", "000003x000000_1_0"]
    columns = {
        "prompts": [ids_of(tokenizer, "where?"), ids_of(tokenizer, "where?")],
        "responses": [ids_of(tokenizer, text) for text in texts],
        "rm_scores": [torch.tensor([0.0, 1.0]), torch.tensor([0.25])],
    }
    others = {
        "uid": ["000003x000000"] * 2,
        "reward_model": [{"ground_truth": "B"}] * 2,
        "extra_fields": [{"reward_extra_info": info} for info in infos],
    }
    whole = {name: torch.nested.as_nested_tensor(rows, layout=torch.jagged) for name, rows in columns.items()}
    whole |= {name: NonTensorStack(*(NonTensorData(each) for each in rows)) for name, rows in others.items()}
    monkeypatch.setattr(
        tq,
        "kv_batch_get",
        lambda keys, partition_id, select_fields: TensorDict(whole, batch_size=2).select(*select_fields),
    )
    trainer = object.__new__(LaDapoTrainer)
    trainer.tokenizer, trainer.global_steps, trainer._said = tokenizer, 3, {}
    trainer._init_dump_executor()
    batch = types.SimpleNamespace(keys=keys, partition_id="train")
    trainer._log_rollout_data(batch, {}, str(tmp_path / "train"))
    # As verl's validation calls it, with all that the reward workers said.
    said = {name: [info[name] for info in infos] for name in infos[0]}
    plain = [tokenizer.decode(row, skip_special_tokens=True) for row in columns["responses"]]
    trainer._dump_generations(["q", "q"], plain, ["B", "B"], [1.0, 0.25], said | {"uid": keys}, str(tmp_path / "val"))
    trainer._shutdown_dump_executor()
    for name in ("train", "val"):
        lines = [json.loads(line) for line in (tmp_path / name / "3.jsonl").read_text().splitlines()]
        assert [line["output"] for line in lines] == texts
        assert [line["response_latents"] for line in lines] == [2, 0]
        assert [line["response_spans"] for line in lines] == [2, 0]
        assert [line["response_tokens"] for line in lines] == [len(row) for row in columns["responses"]]
        assert [line["score"] for line in lines] == [1.0, 0.25]
        assert all("response_text" not in line for line in lines)
