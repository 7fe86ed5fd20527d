"""What the configuration refuses, before anything is loaded."""

import pytest

pytest.importorskip("verl.trainer.main", reason="needs EasyR1: make test-easyr1 EASYR1=path")

from future_l1_plugin.errors import ConfigError
from future_l1_plugin.integrations.easyr1.config import LaDapoConfig, load_config

pytestmark = pytest.mark.easyr1


def test_the_shipped_recipe_reaches_the_workers(make_config):
    config = make_config("latent.clip_low=0.15")
    assert isinstance(config, LaDapoConfig) and config.worker.latent.clip_low == 0.15
    assert config.worker.actor.kl_coef == config.algorithm.kl_coef == 0.01


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("latent.clip_lo=0.1", "latent.clip_lo.*clip_low"),
        ("worker.actor.clip_ratio=0.1", "worker.actor.clip_ratio"),
        ("worker.latent.clip_low=0.2", "worker.latent: the section `latent` at the top"),
        ("latent.policy={name: deterministic, mean_cosine: null}", "latent.kl_weight: .* has no KL"),
        ("rewards=[{term: format, weight: 1.0}]", "no entry is named `accuracy`"),
        ("algorithm.adv_estimator=rloo", "algorithm.adv_estimator: latents need grpo, found rloo"),
        ("algorithm.use_kl_loss=false", "algorithm.use_kl_loss: latents need it, or disable_kl"),
        ("worker.actor.ulysses_size=2", "worker.actor.ulysses_size: latents need 1, found 2"),
        (
            "worker.actor.model.lora={rank: 8, target_modules: all-linear}",
            "worker.actor.model.lora.target_modules: latents need names of the text decoder's layers",
        ),
        (
            "worker={actor: {model: {lora: {rank: 8}}}, ref: {offload: {offload_params: true}}}",
            "worker.ref.offload.offload_params: latents need false under LoRA",
        ),
        ("worker.rollout.name=vllm", "worker.rollout.name: latents need latent_hf, found vllm"),
        ("data.video_fps=1.0", "data.video_fps: latents need none of it, found 1.0"),
        ("config=other.yaml", "config=FILE once, found it 2 times"),
    ],
)
def test_refusals(make_config, override, message):
    with pytest.raises(ConfigError, match=message):
        make_config(override)


def test_a_recipe_may_name_its_parent(arguments, tmp_path):
    file, *rest = arguments
    child = tmp_path / "child.yaml"
    child.write_text(f"defaults: {file.removeprefix('config=')}\nlatent: {{weight: 0.25}}\n")
    assert load_config([f"config={child}", *rest]).latent.weight == 0.25
