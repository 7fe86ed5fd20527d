"""EasyR1's recipe and environment, as far as they can be checked without EasyR1."""

from pathlib import Path

import pytest
import yaml

from future_l1_plugin import compat
from future_l1_plugin.config import from_mapping
from future_l1_plugin.errors import EnvironmentMismatch
from future_l1_plugin.integrations.easyr1.__main__ import main
from future_l1_plugin.integrations.rl.settings import LatentSection, checked_rewards
from future_l1_plugin.integrations.verl.dataset import PromptSettings

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
EASYR1, VERL = (yaml.safe_load((RECIPES / name).read_text()) for name in ("easyr1/la_dapo.yaml", "la_dapo.yaml"))


def test_our_sections_parse_and_say_what_they_say_on_verl():
    assert set(EASYR1) == {"latent", "rewards", "data", "algorithm", "worker", "trainer"}
    assert from_mapping(LatentSection, EASYR1["latent"], "latent") == from_mapping(LatentSection, VERL["latent"], "")
    assert EASYR1["rewards"] == VERL["rewards"]
    assert checked_rewards(EASYR1["rewards"]).weights == {"accuracy": 0.9, "format": 0.1, "r_ctr": 0.2, "r_div": 0.1}
    section = EASYR1["data"]["future_l1"]
    assert from_mapping(PromptSettings, section, "data.future_l1") == from_mapping(
        PromptSettings, VERL["data"]["future_l1"], "data.future_l1"
    )


def test_the_papers_values_are_those_on_verl():
    actor, there = EASYR1["worker"]["actor"], VERL["actor_rollout_ref"]["actor"]
    assert [actor[f"clip_ratio_{end}"] for end in ("low", "high", "dual")] == [
        there[f"clip_ratio_{end}"] for end in ("low", "high", "c")
    ]
    assert actor["optim"]["lr"] == there["optim"]["lr"]
    assert actor["global_batch_size"] == there["ppo_mini_batch_size"]
    assert EASYR1["data"]["rollout_batch_size"] == VERL["data"]["train_batch_size"]
    algorithm = EASYR1["algorithm"]
    assert (algorithm["filter_low"], algorithm["filter_high"]) == (VERL["groups"]["low"], VERL["groups"]["high"])
    assert algorithm["kl_coef"] == there["kl_loss_coef"]
    rollout = VERL["actor_rollout_ref"]["rollout"]
    assert [EASYR1["worker"]["rollout"][k] for k in ("n", "temperature", "top_p")] == [
        rollout[k] for k in ("n", "temperature", "top_p")
    ]


@pytest.mark.parametrize(("flavour", "found"), [("verl", "found upstream verl"), (None, "found none")])
def test_the_wrong_verl_is_refused(monkeypatch, flavour, found):
    monkeypatch.setattr(compat, "verl_flavour", lambda: flavour)
    with pytest.raises(EnvironmentMismatch, match=rf"EasyR1, {found}[^\n]*\nRun: .*make test-easyr1"):
        main([])


def test_its_environment_is_the_core_with_other_versions():
    pins = {pin.name: pin for pin in compat.easyr1_pins()}
    assert {pin.name for pin in compat.PINS if compat.CORE in pin.extras} <= set(pins)
    assert pins["transformers"].supported == ">=4.57,<5"
    assert not set(pins) & {"verl", "vllm", "lmms-eval"}
    for pin in pins.values():
        assert compat.compare(pin.pin, pin.supported) == 0
