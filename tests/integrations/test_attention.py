"""Attention on a GPU: what is refused before workers start or weights load; sdpa keeps packed samples apart."""

import pytest
import torch

pytest.importorskip("verl")

import ray
from hydra import compose, initialize_config_dir

from future_l1_plugin import compat
from future_l1_plugin.errors import EnvironmentMismatch
from future_l1_plugin.integrations.verl.settings import attention, attention_mask_bytes
from future_l1_plugin.integrations.verl.trainer import LaDapoTrainer
from future_l1_plugin.model import load
from future_l1_plugin.paths import recipes_dir

SDPA = "++actor_rollout_ref.model.override_config.attn_implementation=sdpa"


GIVEN = ["actor_rollout_ref.model.path=x", "data.train_files=[a.json]", "data.val_files=[b.json]"]


def recipe(name, *overrides):
    overrides = [*(GIVEN if name == "la_dapo" else []), *overrides]
    with initialize_config_dir(str(recipes_dir()), version_base=None):
        return compose(name, overrides=["hydra.searchpath=[pkg://verl.trainer.config]", *overrides])


def test_a_missing_flash_attn_is_told_before_anything_starts(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(compat, "installed", lambda name: None if name == "flash-attn" else (name, "0.31.0"))
    with pytest.raises(EnvironmentMismatch, match="flash_attention_2 needs flash-attn, which is not installed") as told:
        LaDapoTrainer(recipe("la_dapo"))
    assert not ray.is_initialized()
    assert f"Either set {SDPA}: same results, at the price of a mask of tokens x tokens (0.75 GiB" in str(told.value)
    assert "--no-build-isolation" in str(told.value)


def test_sdpa_by_one_key_and_the_micro_recipe_need_no_package(monkeypatch):
    monkeypatch.setattr(compat, "installed", lambda name: None if name == "flash-attn" else (name, "0.31.0"))
    monkeypatch.setattr(LaDapoTrainer.__base__, "__init__", lambda self, config: None)
    assert attention(recipe("la_dapo")) == "flash_attention_2", "verl's default"
    LaDapoTrainer(recipe("la_dapo", SDPA))
    LaDapoTrainer(recipe("la_dapo_micro"))
    assert not ray.is_initialized()


def test_sft_asks_before_it_loads(tmp_path, monkeypatch):
    from future_l1_plugin.integrations.sft.recipe import SftRecipe, TrainRecipe
    from future_l1_plugin.integrations.sft.run import run

    monkeypatch.setattr(compat, "installed", lambda name: None)
    train = TrainRecipe(attn_implementation="flash_attention_2")
    with pytest.raises(EnvironmentMismatch, match=r"set train\.attn_implementation=sdpa"):
        run(SftRecipe(model="absent", output=str(tmp_path / "out"), train=train))


def test_the_size_of_sdpa_s_mask():
    assert attention_mask_bytes(16384) == 16384 * 16384 * (1 + 2), "boolean, and in bfloat16"


@pytest.fixture(scope="module")
def decoder(tiny_path):
    model, _ = load(tiny_path, dtype=torch.float32, attn_implementation="sdpa")
    return model.model.language_model


def hidden(decoder, embeds, positions):
    """As verl calls it with `use_remove_padding`: no mask, positions (4, 1, n) of which the first row is the text's."""
    given = {"inputs_embeds": embeds[None], "position_ids": positions[:, None], "attention_mask": None}
    return decoder(**given, use_cache=False)[0][0]


@pytest.mark.parametrize("checkpointed", [False, True])
def test_sdpa_keeps_packed_samples_apart(decoder, checkpointed):
    decoder.train(checkpointed)
    if checkpointed:
        decoder.gradient_checkpointing_enable({"use_reentrant": False})
    width = decoder.config.hidden_size
    lengths, rng = (5, 1, 9), torch.Generator().manual_seed(0)
    samples = [torch.randn(n, width, generator=rng) for n in lengths]
    # Vision rows run on at another pace than the text's, and start anew in each sample, too.
    positions = [torch.stack([torch.arange(n), *[torch.arange(n) // 2] * 3]) for n in lengths]
    alone = torch.cat([hidden(decoder, *pair) for pair in zip(samples, positions, strict=True)])
    packed = hidden(decoder, torch.cat(samples), torch.cat(positions, dim=1))
    torch.testing.assert_close(packed, alone, atol=2e-5, rtol=1e-5)
    running_on = torch.cat(positions, dim=1)
    running_on[0] = torch.arange(sum(lengths))  # what tells samples apart is the text's row alone
    assert (hidden(decoder, torch.cat(samples), running_on) - alone).abs().max() > 1e-2
    decoder.gradient_checkpointing_disable()
    decoder.eval()
