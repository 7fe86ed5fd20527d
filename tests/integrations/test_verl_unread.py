"""Keys of verl that would have no effect are refused; what must be given is asked for before Ray starts."""

import os
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

pytest.importorskip("verl.trainer.ppo", reason="needs upstream verl")

from hydra import compose, initialize_config_dir
from hydra.utils import get_class
from omegaconf import OmegaConf, open_dict

from future_l1_plugin.errors import ConfigError
from future_l1_plugin.integrations.verl import unread
from future_l1_plugin.integrations.verl.settings import Settings

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
SEARCH = "hydra.searchpath=[pkg://verl.trainer.config]"
#: The issue's own, and one of each kind. A list of literals beside the table: nobody takes one out without a word.
SOME = {
    "trainer.v1.sampler.sync_refill_failed_groups=true": "failed groups are always replaced",
    "trainer.v1.sampler.max_off_policy_threshold=2": "training here is synchronous",
    "trainer.v1.separate_async.num_warmup_batches=2": "training here is synchronous",
    "trainer.use_v1=false": "the older trainer knows no latents",
    "trainer.balance_batch=false": "always balanced",
    "data.filter_overlong_prompts=true": "data.future_l1.on_bad",
    "data.truncation=left": "never filters, cuts",
    "data.prompt_key=question": "LatentRLDataset reads",
    "data.gen_batch_size=16": "one by one",
    "data.return_raw_chat=false": "LatentRLDataset reads",
    "algorithm.filter_groups.max_num_gen_batches=10": "the section `groups` bounds",
    "algorithm.gamma=0.9": "one reward, at its end",
    "algorithm.kl_ctrl.kl_coef=0.1": "KL is in the loss",
    "reward.custom_reward_function.path=my.py": "{import_path: pkg.mod:name",
    "custom_reward_function.path=my.py": "{import_path: pkg.mod:name",
    "reward.reward_model.enable=true": "rewards are the terms",
    "critic.optim.lr=1e-4": "there is no critic",
    "actor_rollout_ref.actor.grad_clip=0.5": "set actor.optim.clip_grad",
    "actor_rollout_ref.actor.policy_loss.kl_cov_ratio=0.1": "the loss is la_dapo's own",
    "actor_rollout_ref.rollout.multi_turn.enable=true": "one turn",
    "actor_rollout_ref.rollout.trace.backend=mlflow": "trainer.rollout_data_dir",
    "actor_rollout_ref.rollout.do_sample=false": "rollout.temperature=0",
    "+actor_rollout_ref.rollout.repetition_penalty=1.1": "verl's agent loop sends 1",
    "actor_rollout_ref.rollout.enforce_eager=true": "only latent_vllm reads it",
}


def recipe(name, *overrides):
    with initialize_config_dir(str(RECIPES), version_base=None):
        return compose(name, overrides=[SEARCH, *overrides])


@pytest.fixture(scope="module")
def micro():
    return recipe("la_dapo_micro")


@contextmanager
def changed(config, key, other=None):
    """Within, the first value at or below `key` is another, or `other`; gives the full key of that value."""
    while OmegaConf.is_dict(OmegaConf.select(config, key)) and OmegaConf.select(config, key):
        names = (str(name) for name in OmegaConf.select(config, key))
        key += "." + next(name for name in names if name not in ("_target_", "loss_mode"))
    raw = unread._at(OmegaConf.to_container(config, resolve=False), key)
    if other is None:
        found = OmegaConf.select(config, key, throw_on_missing=False)
        other = (not found) if isinstance(found, bool) else found + 1 if isinstance(found, int | float) else "another"
    OmegaConf.update(config, key, other, merge=False, force_add=True)
    yield key
    OmegaConf.update(config, key, raw, merge=False, force_add=True)


def test_the_table_is_made_of_keys_of_verl_and_each_is_refused(micro):
    table = dict(unread.UNREAD)
    for more in unread.UNREAD_WITH.values():  # la_dapo and latent_hf, as in the micro recipe
        table |= more
    for key, why in table.items():
        parent, _, name = key.rpartition(".")
        assert key in unread._UNLISTED or name in (unread._at(unread._defaults(), parent) if parent else micro), key
        with changed(micro, key) as leaf, pytest.raises(ConfigError) as error:
            unread.check_unread(micro)
        assert str(error.value).startswith(f"{leaf}: ") and f"would have no effect: {why}" in str(error.value)
    unread.check_unread(micro)


@pytest.mark.parametrize("override", SOME)
def test_keys_by_hand(micro, override):
    key, _, value = override.lstrip("+").partition("=")
    with (
        changed(micro, key, yaml.safe_load(value)),
        pytest.raises(ConfigError, match=re.escape(SOME[override])) as error,
    ):
        Settings.from_config(micro)
    assert key in str(error.value)


def test_what_vllm_reads_is_free_with_vllm():
    given = ["data.train_files=[a]", "data.val_files=[b]", "actor_rollout_ref.model.path=c"]
    unread.check_unread(recipe("la_dapo", *given, "actor_rollout_ref.rollout.enforce_eager=true"))
    gamma = ["algorithm.gamma=0.9", "algorithm.adv_estimator=reinforce_plus_plus"]
    unread.check_unread(recipe("la_dapo", *given, *gamma))


def test_defaults_follow_what_the_user_set(micro):
    """verl's default of a key may be another key's value; and verl resolves its configuration before it asks us."""
    config = OmegaConf.create(OmegaConf.to_container(micro, resolve=False))
    config.trainer.n_gpus_per_node = 3  # rollout.n_gpus_per_node is the same by default
    unread.check_unread(config)
    OmegaConf.resolve(config)
    assert config.actor_rollout_ref.rollout.n_gpus_per_node == 3
    unread.check_unread(config)
    config.actor_rollout_ref.rollout.n_gpus_per_node = 4
    with pytest.raises(ConfigError, match=r"rollout\.n_gpus_per_node: 4 would have no effect: .* default: 3"):
        unread.check_unread(config)


def test_the_defaults_are_those_that_hydra_composes():
    with initialize_config_dir(str(Path(unread.files("verl") / "trainer" / "config")), version_base=None):
        composed = OmegaConf.to_container(compose("ppo_trainer"), resolve=False)
    ours = OmegaConf.to_container(OmegaConf.create(unread._defaults()), resolve=False)
    assert ours["actor_rollout_ref"]["rollout"].pop("repetition_penalty") == 1.0
    assert {key: composed[key] for key in ours} == ours


def test_what_must_be_given():
    files = ["data.train_files=[a.json]", "data.val_files=[b.json]"]
    for given, key in (
        (files, "actor_rollout_ref.model.path"),
        (["actor_rollout_ref.model.path=sft", files[1]], "data.train_files"),
        (["actor_rollout_ref.model.path=sft", files[0]], "data.val_files"),
    ):
        config = recipe("la_dapo", *given)
        with pytest.raises(ConfigError, match=rf"{re.escape(key)}: must be given: .* as {re.escape(key)}=VALUE"):
            Settings.from_config(config)
    with open_dict(config):
        config.data.val_files = "c.json"
    Settings.from_config(config)


def test_verl_s_own_command_says_so_before_ray_starts(tmp_path):
    command = [sys.executable, "-m", "verl.trainer.main_ppo", "--config-dir", str(RECIPES), "--config-name", "la_dapo"]
    env = {**os.environ, "RAY_ADDRESS": "127.0.0.1:1"}  # Ray would fail with another message
    found = subprocess.run([*command, "+ablations=dapo"], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert found.returncode == 1
    assert "future_l1_plugin: actor_rollout_ref.model.path: must be given" in found.stderr
    assert "Traceback" not in found.stderr and "ray init kwargs" not in found.stdout
    assert list(tmp_path.iterdir()) == []


def test_recipes_inherit_the_check_and_it_leaves_hydra_s_part_out():
    from future_l1_plugin.integrations.verl.start import CheckBeforeStart

    with initialize_config_dir(str(RECIPES), version_base=None):
        config = compose("la_dapo_micro", [SEARCH, "+ablations=dapo"], return_hydra_config=True)
    assert get_class(config.hydra.callbacks.future_l1._target_) is CheckBeforeStart
    CheckBeforeStart().on_run_start(config)
    config.data.truncation = "left"
    with pytest.raises(SystemExit, match=r"future_l1_plugin: data\.truncation: 'left' would have no effect"):
        CheckBeforeStart().on_run_start(config)
