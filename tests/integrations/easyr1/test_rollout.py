"""The rollout on video prompts, its weights, and the actor's word on what it drew."""

import shutil

import numpy as np
import pytest
import torch

pytest.importorskip("verl.trainer.main", reason="needs EasyR1: make test-easyr1 EASYR1=path")

from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from verl.models.monkey_patch import apply_ulysses_patch
from verl.protocol import DataProto

from future_l1_plugin.errors import CheckpointError
from future_l1_plugin.integrations.easyr1.actor import ROLLOUT
from future_l1_plugin.integrations.easyr1.dataset import create_dataloaders
from future_l1_plugin.integrations.easyr1.model import latent_class
from future_l1_plugin.integrations.easyr1.rollout import build_model
from future_l1_plugin.la_dapo import Tempering, latent_log_prob
from future_l1_plugin.latent import build_policy
from future_l1_plugin.model.backbone import QWEN3_VL

pytestmark = pytest.mark.easyr1

N = 4  # rollouts per prompt


def roll_out(worker, config, prompts=2, **asked):
    data = DataProto.from_single_dict(next(iter(create_dataloaders(config.data, worker.processor)[0])))[:prompts]
    data.meta_info |= asked
    worker.rollout_sharding_manager.load_vllm_and_sync_weights()
    batch = worker.rollout.generate_sequences(data)
    worker.rollout_sharding_manager.offload_vllm()
    return data, batch


def test_the_actor_scores_a_rollout_on_video_as_it_was_sampled(worker, make_config, decoded):
    """Positions, pixels, latents and weights all have to be right for this."""
    _, batch = roll_out(worker, make_config())
    assert batch.batch["responses"].shape == (2 * N, 24)
    assert sum(len(rollout.latents) for rollout in batch.non_tensor_batch[ROLLOUT]) > 5
    batch.non_tensor_batch["uid"] = np.array([i // N for i in range(2 * N)], dtype=object)
    worker._process_multi_modal_inputs(batch)
    assert set(batch.non_tensor_batch["multi_modal_inputs"][0]) == {"pixel_values_videos", "video_grid_thw"}
    found = worker.compute_log_probs(batch).batch["old_log_probs"]
    trained = batch.batch["response_mask"].bool()
    sampled = torch.cat([rollout.log_probs[rollout.actions] for rollout in batch.non_tensor_batch[ROLLOUT]])
    torch.testing.assert_close(sampled, found[trained], atol=1e-4, rtol=0)
    outputs = [(out, i) for out in decoded for i in range(len(out.responses))]
    assert len(decoded) == 2  # batches of six and of two
    for values, mask, (out, i) in zip(found, batch.batch["response_mask"].bool(), outputs, strict=True):
        ids, expected = out.responses[i], out.logprobs[i].double().clone()
        policy = build_policy("vmf", mean_cosine=0.9)
        density = latent_log_prob(policy, out.means[i], out.latents[i], Tempering("sqrt_dim"))
        expected[ids == worker.model_config.latent_id] = density + torch.log1p(-out.end_logprobs[i].double().exp())
        mask = mask[: len(ids)]
        assert mask.tolist() == (~out.forced[i] | (ids == worker.model_config.latent_id)).tolist()
        torch.testing.assert_close(values[: len(ids)][mask], expected[mask], atol=1e-4, rtol=0)


def test_validation_is_greedy_one_response_a_prompt_with_its_own_policy(worker, make_config, decoded):
    config = make_config()
    prompts, batch = roll_out(worker, config, **config.worker.rollout.val_override_config)
    again = roll_out(worker, config, **config.worker.rollout.val_override_config)[1]
    assert len(batch) == len(prompts) == 2
    assert torch.equal(batch.batch["responses"], again.batch["responses"])
    out = decoded[0]
    assert sum(map(len, out.latents)) > 0
    for latents, means in zip(out.latents, out.means, strict=True):
        assert torch.equal(latents, means)  # deterministic


def test_the_rollout_follows_the_actor(worker):
    """The copy gets the actor's weights before each rollout, and only then."""
    weight = worker.rollout.model.model.language_model.norm.weight
    with FSDP.summon_full_params(worker.fsdp_module):
        worker.fsdp_module.model.language_model.norm.weight.data[0] += 1.0
        expected = worker.fsdp_module.model.language_model.norm.weight.data.clone()
    assert weight[0] == expected[0] - 1.0
    worker.rollout_sharding_manager.load_vllm_and_sync_weights()
    assert torch.equal(weight, expected)
    with FSDP.summon_full_params(worker.fsdp_module):
        worker.fsdp_module.model.language_model.norm.weight.data[0] -= 1.0


def test_padding_free_training_leaves_the_rollout_as_it_is(base):
    """EasyR1 then replaces transformers' forward passes by ones that keep no cache."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.qwen3_vl import modeling_qwen3_vl as stock

    ids = torch.tensor([[427, 387, 198, 256, 428]])
    before = build_model(base, None, "fp32").generate(input_ids=ids, custom_generate=greedy, max_new_tokens=5)
    flash = ALL_ATTENTION_FUNCTIONS["flash_attention_2"]
    forwards = {kind: kind.forward for kind in (stock.Qwen3VLModel, stock.Qwen3VLForConditionalGeneration)}
    try:
        apply_ulysses_patch("qwen3_vl")
        assert stock.Qwen3VLModel.forward is not forwards[stock.Qwen3VLModel]
        after = build_model(base, None, "fp32").generate(input_ids=ids, custom_generate=greedy, max_new_tokens=5)
    finally:
        ALL_ATTENTION_FUNCTIONS["flash_attention_2"] = flash
        for kind, forward in forwards.items():
            kind.forward = forward
    assert torch.equal(before, after)


def greedy(model, ids, *, stopping_criteria, logits_processor, generation_config, synced_gpus=False, **kwargs):
    """The least that a generation loop does."""
    first = True
    while not bool(stopping_criteria(ids, None).all()):
        inputs = model.prepare_inputs_for_generation(ids, is_first_iteration=first, **kwargs)
        outputs, first = model(**inputs, return_dict=True), False
        kwargs = model._update_model_kwargs_for_generation(outputs, kwargs)
        ids = torch.cat([ids, outputs.logits[:, -1:].argmax(-1)], 1)
    return ids


def test_a_latent_head_is_loaded_and_reaches_the_rollout(base, headed, tmp_path, make_worker, make_config):
    with pytest.raises(CheckpointError, match="weights are missing"):
        shutil.copytree(base, tmp_path / "headless")
        shutil.copy(headed / "config.json", tmp_path / "headless")
        latent_class(QWEN3_VL).from_pretrained(tmp_path / "headless")
    worker = make_worker(make_config(f"worker.actor.model.model_path={headed}"))
    worker.rollout_sharding_manager.load_vllm_and_sync_weights()
    expected = dict(
        latent_class(QWEN3_VL).from_pretrained(headed, dtype=torch.float32).projection_head.named_parameters()
    )
    for name, weight in worker.rollout.model.projection_head.named_parameters():
        torch.testing.assert_close(weight, expected[name])
