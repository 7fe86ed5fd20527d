"""The recipes for verl against verl's own configuration, and what is said about wrong ones."""

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

pytest.importorskip("verl")

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.config import validate_config

from future_l1_plugin.errors import ConfigError, EnvironmentMismatch
from future_l1_plugin.integrations.verl.resume import check_same_run, logged_before, put_back
from future_l1_plugin.integrations.verl.settings import _SECTIONS, Settings
from future_l1_plugin.la_dapo import RolloutCorrection

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
ABLATIONS = ("grpo", "dapo", "dapo_ctr", "dapo_div", "text_only")
#: What a user must give for the full recipe.
GIVEN = ["data.train_files=[rl.json]", "data.val_files=[futurebench.json]", "actor_rollout_ref.model.path=sft"]


def recipe(name="la_dapo_micro", *overrides):
    given = GIVEN if name == "la_dapo" else []
    with initialize_config_dir(str(RECIPES), version_base=None):
        search = "hydra.searchpath=[pkg://verl.trainer.config]"  # where `verl.trainer.main_ppo` looks by itself
        return compose(name, overrides=[search, *given, *overrides])


@pytest.mark.parametrize("ablation", [None, *ABLATIONS])
@pytest.mark.parametrize("name", ["la_dapo", "la_dapo_micro"])
def test_verl_and_we_take_it(name, ablation):
    config = recipe(name, *([f"+ablations={ablation}"] if ablation else []))
    validate_config(config, need_reference_policy(config), need_critic(config))
    settings = Settings.from_config(config)
    terms = {"accuracy", "format"} | {
        None: {"r_ctr", "r_div"},
        "dapo_ctr": {"r_ctr"},
        "dapo_div": {"r_div"},
    }.get(ablation, set())
    assert set(settings.rewards.names) == terms
    latent = ablation in (None, "dapo_ctr", "dapo_div")
    assert settings.loss.latent_weight == (0.5 if latent else 0.0)
    assert settings.latent.policy["name"] == ("vmf" if latent else "deterministic")
    assert settings.loss.clip_high == (0.2 if ablation in ("grpo", "text_only") else 0.28)
    assert config.algorithm.filter_groups.enable == (ablation not in ("grpo", "text_only"))
    assert config.trainer.default_local_dir.endswith("/" + (ablation or "la_dapo")), "would mix with another run"


def test_the_paper_s_values():
    config = recipe("la_dapo")
    loss = Settings.from_config(config).loss
    assert (loss.clip_low, loss.clip_high, loss.dual_clip) == (0.2, 0.28, 3.0)
    assert (loss.latent_clip_low, loss.latent_clip_high, loss.latent_weight) == (0.1, 0.1, 0.5)
    assert (loss.kl_weight, loss.latent_kl_weight) == (0.01, 0.01)
    rollout, actor = config.actor_rollout_ref.rollout, config.actor_rollout_ref.actor
    assert (rollout.n, rollout.temperature, rollout.top_p) == (8, 0.9, 0.99)
    assert (config.data.train_batch_size, actor.optim.lr) == (64, 1e-6)
    assert (config.groups.low, config.groups.high) == (0.1, 0.9)
    assert Settings.from_config(config).rewards.weights == {"accuracy": 0.9, "format": 0.1, "r_ctr": 0.2, "r_div": 0.1}


def test_each_value_of_the_full_recipe_is_explained():
    lines = (RECIPES / "la_dapo.yaml").read_text().splitlines()
    plain = [
        line
        for line in lines
        if re.match(r"^ *[\w-]+: +[^#\s]", line)
        and not re.search(r"\s#\s*\S", line)
        # names of classes and modules say what they are
        and not re.search(r"(default_agent_loop|agent_loop_manager_class|source|name|module|path): [A-Za-z{]", line)
    ]
    assert plain == []


def test_ablations_only_change_values():
    for name in ABLATIONS:
        values = yaml.safe_load((RECIPES / "ablations" / f"{name}.yaml").read_text())
        assert set(values) <= {"latent", "rewards", "algorithm", "actor_rollout_ref", "trainer"}


def test_we_know_every_section_of_verl():
    config = recipe()
    OmegaConf.set_struct(config, False)
    assert set(config) <= _SECTIONS
    with pytest.raises(ConfigError, match=r"unknown section `latnt`\. Did you mean `latent`"):
        Settings.from_config(recipe("la_dapo_micro", "+latnt.weight=1"))


def test_the_reference_is_held_in_the_dtype_it_computes_in():
    for name, dtype in (("la_dapo", "bf16"), ("la_dapo_micro", "fp32")):
        reference = recipe(name).actor_rollout_ref.ref.fsdp_config
        assert reference.model_dtype == dtype
        assert (reference.get("mixed_precision") or {}).get("param_dtype", "bf16") == dtype


def correction(keys):
    return f"algorithm.rollout_correction={{{keys}}}"


def test_rollouts_are_corrected_where_engines_compute_in_bfloat16():
    config = recipe("la_dapo")
    assert config.actor_rollout_ref.rollout.dtype == "bfloat16"
    assert Settings.from_config(config).correction == RolloutCorrection(upper=2.0)
    config = recipe("la_dapo_micro")
    assert config.actor_rollout_ref.rollout.dtype == "float32"
    assert Settings.from_config(config).correction is None
    given = correction("rollout_is: token, rollout_is_threshold: 0.5_5.0, rollout_is_batch_normalize: true")
    assert Settings.from_config(recipe("la_dapo_micro", given)).correction == RolloutCorrection(5.0, 0.5, True)
    assert Settings.from_config(recipe("la_dapo_micro", correction("rollout_is: null"))).correction is None


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("+latent.wieght=1", "latent: unknown key `wieght`. Did you mean `weight`"),
        ("latent.policy.mean_cosine=2", "mean_cosine"),
        ("latent.policy.name=vfm", "expected one of deterministic, vmf, gaussian, laplace, found 'vfm'"),
        ("latent.tempering=cube_dim", "latent tempering: expected one of none, sqrt_dim, dim or a number"),
        ("+latent.policy.sigma=1", "unknown key 'sigma'"),
        (
            "latent.policy={name: deterministic, mean_cosine: null}",
            "latent.kl_weight: 0.01 with a deterministic policy",
        ),
        ("groups.low=0.95", "expected 0 <= low <= high <= 1"),
        ("+groups.hihg=1", "unknown key `hihg`. Did you mean `high`"),
        ("rewards=[{term: acuracy, weight: 1}]", "accuracy"),
        ("rewards=[{term: accuracy, weight: 1, temprature: 2}]", "temprature"),
        ("rewards=[{term: format, weight: 1}]", "no entry is named `accuracy`"),
        ("actor_rollout_ref.actor.strategy=fsdp2", "actor_rollout_ref.actor.strategy: latents need fsdp2_latent"),
        ("actor_rollout_ref.rollout.name=vllm", "rollout.name: latents need latent_vllm or latent_hf, found vllm"),
        ("actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean", "latents need token-mean"),
        ("actor_rollout_ref.actor.entropy_coeff=-0.1", "entropy_weight: expected a number of at least 0, found -0.1"),
        ("algorithm.filter_groups.metric=seq_reward", "filter_groups.metric: latents need acc"),
        ("reward.reward_manager.source=register", "reward_manager.source: latents need importlib and LatentRewardMan"),
        ("actor_rollout_ref.actor.clip_ratio_low=0", "clip_low"),
        ("actor_rollout_ref.model.lora_rank=8", "actor_rollout_ref.model.lora.merge: latents need True"),
        ("actor_rollout_ref.model.use_fused_kernels=true", "use_fused_kernels: latents need False"),
        ("algorithm.use_kl_in_reward=true", "use_kl_in_reward: latents need False"),
        (correction("rollout_is: sequence"), "rollout_correction.rollout_is: expected token or null, found sequence"),
        (
            correction("rollout_is: token, bypass_mode: true"),
            "rollout_correction.bypass_mode: expected false, found True",
        ),
        (correction("rollout_rs: token_k1"), "rollout_correction.rollout_rs: expected null, found token_k1. It would"),
        (correction("rollout_rs_threshold: 2"), "rollout_correction.rollout_rs_threshold: expected null, found 2"),
        (correction("loss_type: reinforce"), "rollout_correction.loss_type: expected ppo_clip, found reinforce"),
        (correction("rollout_token_veto: 1"), "rollout_correction: unknown key `rollout_token_veto`"),
        (correction("rollout_is_threshold: 3"), "rollout_is_threshold: 3 has no effect while rollout_is is null"),
        (correction("rollout_is_batch_normalize: true"), "rollout_is_batch_normalize: True has no effect while"),
        (correction("rollout_is: token, rollout_is_threshold: 0"), "expected an upper bound above 0, found 0"),
        (correction("rollout_is: token, rollout_is_threshold: 5.0_1.0"), "a lower bound in (0, 1.0], found 5.0"),
        (correction("rollout_is: token, rollout_is_threshold: high"), "expected a number or"),
        (
            "actor_rollout_ref.actor.policy_loss.loss_mode=gspo",
            "policy_loss.loss_mode: latents need vanilla, found gspo",
        ),
        ("trainer.critic_warmup=5", "trainer.critic_warmup: latents need 0, found 5"),
        ("groups.max_failed=-1", "groups.max_failed: expected 0 (none) or more, found -1"),
    ],
)
def test_a_wrong_value_is_refused_with_the_fix(override, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        Settings.from_config(recipe("la_dapo_micro", override))


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_a_missing_vllm_is_told_before_anything_starts():
    from future_l1_plugin.integrations.verl.trainer import LaDapoTrainer

    with pytest.raises(EnvironmentMismatch, match="vllm is not installed"):
        LaDapoTrainer(recipe("la_dapo"))


def test_a_run_is_only_resumed_under_its_own_settings(tmp_path):
    mine = recipe("la_dapo_micro", f"out={tmp_path}")
    check_same_run(mine)
    check_same_run(recipe("la_dapo_micro", f"out={tmp_path}", "latent.weight=1"))  # no checkpoint yet: a new start
    check_same_run(mine)
    (tmp_path / "la_dapo" / "latest_checkpointed_iteration.txt").write_text("10")
    # What errors advise to raise, and what costs memory only.
    raised = ["groups.max_failed=32", "groups.max_rounds=20", "data.val_batch_size=16"]
    check_same_run(recipe("la_dapo_micro", f"out={tmp_path}", *raised, "data.future_l1.frame_cache_mb=1"))
    check_same_run(mine)
    with pytest.raises(ConfigError, match=r"latent\.weight: 0\.5 -> 1"):
        check_same_run(recipe("la_dapo_micro", f"out={tmp_path}", "latent.weight=1"))
    check_same_run(recipe("la_dapo_micro", f"out={tmp_path}", "latent.weight=1", "trainer.resume_mode=disable"))


def test_what_a_run_under_way_may_change(tmp_path, capsys):
    """What users lower when memory ran out, raise when something was too long, and move: each against the start."""
    keys = ["data.train_files=[a.json]", "data.val_files=[b.json]", "actor_rollout_ref.model.path=M"]
    mine = recipe("la_dapo", *keys, f"out={tmp_path}")
    folder = tmp_path / "la_dapo"
    check_same_run(mine)
    (folder / "latest_checkpointed_iteration.txt").write_text("60")

    def go_on(**changed) -> str:
        config = mine.copy()
        for key, value in changed.items():
            OmegaConf.update(config, key, value, force_add=True)
        check_same_run(config)
        return capsys.readouterr().out

    worker = "actor_rollout_ref"
    rounding = {
        f"{worker}.rollout.gpu_memory_utilization": 0.5,
        f"{worker}.actor.ppo_max_token_len_per_gpu": 14336,
        f"{worker}.actor.fsdp_config.param_offload": True,
        f"{worker}.actor.fsdp_config.offload_policy": True,
        f"{worker}.rollout.max_num_seqs": 64,
        f"{worker}.rollout.tensor_model_parallel_size": 2,
        f"{worker}.rollout.log_prob_max_token_len_per_gpu": 8192,
        f"{worker}.rollout.enforce_eager": True,
        f"{worker}.model.use_remove_padding": False,
    }
    for key, value in rounding.items():
        said = [line for line in go_on(**{key: value}).splitlines() if key in line]
        assert len(said) == 1 and "results agree to rounding" in said[0], key
    free = {
        f"{worker}.model.enable_gradient_checkpointing": False,
        f"{worker}.rollout.free_cache_engine": False,
        f"{worker}.actor.checkpoint.save_contents": ["model", "optimizer", "extra"],
        f"{worker}.model.path": "/elsewhere/M",
        "data.train_files": ["/mnt/new/a.json"],
        "data.val_files": ["c.json"],
        "data.future_l1.frame_cache_mb": 256,
        "data.future_l1.video_root": "/mnt/new",
        "reward.num_workers": 4,
        "trainer.max_actor_ckpt_to_keep": 1,
        "trainer.test_freq": 5,
    }
    assert go_on(**free) == ""
    more = {"trainer.total_epochs": 2, "data.max_prompt_length": 16384, f"{worker}.rollout.max_model_len": 18432}
    said = go_on(**more)
    assert all(f"going on with more: {key}: " in said for key in more)
    refused = {
        "data.max_response_length": 1024,
        f"{worker}.actor.optim.lr": 5e-7,
        "data.max_prompt_length": 8192,
        "data.train_max_samples": 100,
        "trainer.n_gpus_per_node": 4,
        f"{worker}.actor.checkpoint.save_contents": ["model"],
        "algorithm.filter_groups.enable": False,
    }
    for key, value in refused.items():
        with pytest.raises(ConfigError) as error:
            go_on(**{key: value})
        assert ("ranks: 8 -> 4" if key == "trainer.n_gpus_per_node" else f"{key}: ") in str(error.value)
        assert "trainer.resume_mode=resume_path" in str(error.value)
    shared = {"trainer.n_gpus_per_node": 4, "trainer.nnodes": 2}  # as many ranks
    assert go_on(**shared) == ""


def test_a_resumed_run_keeps_its_metrics(tmp_path, monkeypatch):
    from verl.utils.tracking import Tracking

    monkeypatch.chdir(tmp_path)  # the logger's folder is relative
    config = recipe("la_dapo_micro", "out=runs")
    arguments = (config.trainer.project_name, config.trainer.experiment_name, ["file"])

    def lines():
        return [json.loads(line)["step"] for line in (tmp_path / "runs/la_dapo/metrics.jsonl").read_text().splitlines()]

    first = Tracking(*arguments)
    for step in range(4):
        first.log({"reward": 0.5}, step)
    first.finish()
    with (tmp_path / "runs/la_dapo/metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "da')  # killed
    assert logged_before(config, 0) == b""
    before = logged_before(config, 2)
    second = Tracking(*arguments)
    second.log({"val": 0.1}, 2)
    put_back(second, before)
    second.log({"reward": 0.6}, 3)
    second.finish()
    assert lines() == [0, 1, 2, 2, 3]
