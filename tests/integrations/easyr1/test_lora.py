"""LoRA: what a step changes, that rollout and reference follow, and that checkpoints come back and load elsewhere."""

from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("verl.trainer.main", reason="needs EasyR1: make test-easyr1 EASYR1=path")

import peft
from peft import PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from verl.workers import fsdp_workers
from verl.workers.actor.config import LoraConfig

from future_l1_plugin.errors import ConfigError, EnvironmentMismatch
from future_l1_plugin.integrations.easyr1.actor import LatentActor
from future_l1_plugin.integrations.easyr1.lora import of_one_dtype
from future_l1_plugin.integrations.easyr1.model import latent_class
from future_l1_plugin.model.backbone import QWEN3_VL
from future_l1_plugin.patches import easyr1_lora

from .test_actor import REFERENCE, reference_batch

pytestmark = pytest.mark.easyr1

LORA = "worker.actor.model.lora={rank: 4, alpha: 8}"


@pytest.fixture(scope="module")
def make(make_worker, make_config):
    def build(*overrides):
        worker = make_worker(make_config(LORA, "worker.actor.optim.lr=1.0e-2", *overrides))
        worker.actor.config.global_batch_size_per_device = len(REFERENCE["rows"])
        return worker

    return build


@pytest.fixture(scope="module")
def stepped(make):
    """A worker before and after one step: (worker, weights before, reference's log-probabilities before)."""
    worker = make()
    before = {name: weight.clone() for name, weight in weights(worker).items()}
    reference = as_reference(worker)
    worker.actor.update_policy(reference_batch())
    return worker, before, reference


def weights(worker):
    return get_model_state_dict(worker.fsdp_module)


def as_reference(worker):
    with worker.ref_fsdp_module.disable_adapter():
        return worker.ref_policy.compute_log_prob(reference_batch())


def test_a_step_changes_the_adapters_and_three_rows(stepped):
    worker, before, _ = stepped
    changed = {name for name, weight in weights(worker).items() if not torch.equal(weight, before[name])}
    rows = {name for name in before if "trainable_tokens_delta" in name}
    assert rows and rows < changed
    assert changed - rows == {name for name in before if "lora_B" in name}  # A has no gradient while B is zero
    (name,) = {name for name in rows if "embed_tokens" in name}
    assert (weights(worker)[name] != before[name]).any(1).tolist() == [True] * 3


def test_the_reference_is_the_start(stepped):
    worker, _, reference = stepped
    assert torch.equal(as_reference(worker), reference)
    after = worker.actor.compute_log_prob(reference_batch())
    assert (after - reference).abs().max() > 1e-2


def loss_of(worker, model):
    """By the worker's settings; `model` without FSDP."""
    actor = LatentActor(worker.config.actor, model, worker.config.latent, actor_optimizer=object())
    data = reference_batch()
    text, latent = actor._masks(data.batch)
    inputs = {**data.batch, **data.non_tensor_batch}
    with torch.no_grad():
        return actor._la_dapo(inputs, REFERENCE["temperature"], int(text.sum()), int(latent.sum())).loss.item()


def test_the_rollout_decodes_with_merged_weights(stepped):
    worker, before, _ = stepped
    embedding = worker.rollout.model.get_input_embeddings().original_module
    for _ in range(3):  # merged and taken apart again, nothing is lost
        worker.rollout_sharding_manager.load_vllm_and_sync_weights()
        merged = LatentActor(worker.config.actor, worker.rollout.model, worker.config.latent)
        expected, found = (actor.compute_log_prob(reference_batch()) for actor in (worker.actor, merged))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
        assert loss_of(worker, worker.rollout.model) == pytest.approx(loss_of(worker, worker.fsdp_module), abs=1e-4)
    (start,) = (w for name, w in before.items() if name.endswith("embed_tokens.token_adapter.base_layer.weight"))
    moved = (embedding.weight != start).any(1).nonzero()[:, 0]
    assert moved.tolist() == [452, 453, 454]
    worker.rollout_sharding_manager.offload_vllm()


def test_a_checkpoint_comes_back_and_its_adapters_load_elsewhere(stepped, make, base, tmp_path):
    worker, _, _ = stepped
    worker.save_checkpoint(str(tmp_path))
    plain = (
        latent_class(QWEN3_VL).from_pretrained(base, dtype=torch.bfloat16).float()
    )  # EasyR1's dtype of frozen weights
    elsewhere = PeftModel.from_pretrained(plain, tmp_path / "lora_adapter")
    assert elsewhere.peft_config["default"].base_model_name_or_path == str(base)
    assert loss_of(worker, elsewhere) == pytest.approx(loss_of(worker, worker.fsdp_module), abs=1e-4)
    again = make("worker.rollout.seed=1")
    again.load_checkpoint(str(tmp_path))
    for one in (worker, again):
        one.actor.update_policy(reference_batch())
    expected = weights(worker)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights(again).items())


def test_a_latent_head_is_trained_as_a_whole_and_an_lm_head_of_its_own_has_rows_too(make, headed, tmp_path):
    worker = make(f"worker.actor.model.model_path={headed}")
    before, reference = {name: weight.clone() for name, weight in weights(worker).items()}, as_reference(worker)
    worker.actor.update_policy(reference_batch())
    changed = {name for name, weight in weights(worker).items() if not torch.equal(weight, before[name])}
    head = {name for name in before if "projection_head.modules_to_save" in name}
    rows = {name for name in before if "trainable_tokens_delta" in name}
    assert head and len(rows) == 2
    assert changed - head - rows == {name for name in before if "lora_B" in name} and head | rows <= changed
    assert torch.equal(as_reference(worker), reference)
    expected = loss_of(worker, worker.fsdp_module)
    worker.rollout_sharding_manager.load_vllm_and_sync_weights()
    assert loss_of(worker, worker.rollout.model) == pytest.approx(expected, abs=1e-4)
    worker.save_checkpoint(str(tmp_path))
    plain = latent_class(QWEN3_VL).from_pretrained(headed, dtype=torch.bfloat16).float()
    assert loss_of(worker, PeftModel.from_pretrained(plain, tmp_path / "lora_adapter")) == pytest.approx(
        expected, abs=1e-4
    )


@pytest.mark.parametrize("target", ["qkv", "q_prj", "lm_head"])
def test_adapters_elsewhere_are_refused(make, target):
    with pytest.raises(ConfigError, match=f"worker.actor.model.lora.target_modules: .* found {target}, which is"):
        make(f"worker.actor.model.lora.target_modules='q_proj,{target}'")


def test_the_patch_is_still_needed(monkeypatch):
    """It goes when EasyR1 can be asked for trained rows, and says so when EasyR1 has moved on."""
    assert {field.name for field in fields(LoraConfig)} == {"rank", "alpha", "target_modules", "exclude_modules"}
    workers = SimpleNamespace(FSDPWorker=fsdp_workers.FSDPWorker, get_peft_model=None, __file__="fsdp_workers.py")
    patch = easyr1_lora.with_our_word(workers, None, None)
    with pytest.raises(EnvironmentMismatch, match="_build_model_optimizer to call get_fsdp_wrap_policy"), patch:
        pass


def test_a_rank_that_starts_without_weights_keeps_none_apart():
    """EasyR1's other ranks build on the meta device; FSDP then shares parameters and buffers of the first."""
    with torch.device("meta"):
        model = torch.nn.ModuleDict({"embed_tokens": torch.nn.Embedding(8, 4), "layer": torch.nn.Linear(4, 4)})
    config = peft.LoraConfig(target_modules=["layer"], trainable_token_indices={"embed_tokens": [5, 6]})
    adapted = get_peft_model(model, config)
    for weight in adapted.parameters():
        weight.data = weight.data.to(torch.float32 if weight.requires_grad else torch.bfloat16)
    of_one_dtype(adapted, lambda module, **_: isinstance(module, LoraLinear))
    assert not list(adapted.buffers())
    found = {"layer" in name: weight.dtype for name, weight in adapted.named_parameters() if "lora_" not in name}
    assert found == {False: torch.float32, True: torch.bfloat16}
