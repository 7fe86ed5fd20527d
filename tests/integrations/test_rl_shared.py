"""What every RL host shares: rollouts, verdicts on groups, and the table of metrics."""

from pathlib import Path

import pytest
import torch
from rl_rows import a_prompt, rollout_of

from future_l1_plugin.integrations import rl
from future_l1_plugin.integrations.rl.__main__ import page
from future_l1_plugin.integrations.rl.groups import GroupFilter, Verdict
from future_l1_plugin.integrations.rl.metrics import METRICS
from future_l1_plugin.integrations.rl.rollouts import rollouts_of
from future_l1_plugin.integrations.rl.samples import make_sample
from future_l1_plugin.la_dapo import LatentScoring, rollout_log_probs
from future_l1_plugin.latent import LatentTokens
from future_l1_plugin.model import LatentConfig, generate, load, make_tiny

VMF = {"name": "vmf", "mean_cosine": 0.9}


def known(name: str) -> bool:
    return any(metric.matches(name) for metric in METRICS)


def test_the_page_is_what_the_table_says():
    assert Path(rl.__file__).with_name("README.md").read_text() == page()


@pytest.mark.parametrize(
    ("name", "is_known"),
    [
        ("latent/spans_per_response", True),
        ("rollout_gap/angle_p99", True),
        ("actor/latent/kl_ref", True),
        ("actor/text/ratio_gap_first_max", True),
        ("reward/r_div/cosine", True),
        ("reward", True),
        ("rewards", False),
        ("groups/kept", False),
        ("actor/text/ratio_gap", False),
    ],
)
def test_which_names_the_table_knows(name, is_known):
    assert known(name) == is_known


def test_a_name_is_in_one_row():
    names = ["latent/spans_per_response", "groups/rounds", "groups/failed", "actor/text/kl_old", "reward/accuracy"]
    assert [sum(metric.matches(name) for metric in METRICS) for name in names] == [1] * 5


@pytest.mark.parametrize(
    ("bounds", "correct", "unjudged", "verdict"),
    [
        ((0.1, 0.9), [1, 0], False, Verdict.KEPT),
        ((0.1, 0.9), [1, 1], False, Verdict.TOO_EASY),
        ((0.1, 0.9), [0, 0], False, Verdict.TOO_HARD),
        ((0.25, 0.75), [1, 0, 0, 0], False, Verdict.KEPT),  # bounds belong to what is kept
        ((0.1, 0.9), [1, 0], True, Verdict.NO_VERDICT),
        (None, [1, 1], False, Verdict.KEPT),
        (None, [1, 1], True, Verdict.NO_VERDICT),
    ],
)
def test_verdicts_on_groups(bounds, correct, unjudged, verdict):
    assert GroupFilter(bounds, "ROUNDS", "OFF").verdict([float(c) for c in correct], unjudged) == verdict


def test_too_few_groups_are_explained():
    seen = {Verdict.TOO_HARD: 5, Verdict.TOO_EASY: 1, Verdict.FAILED: 2}
    assert GroupFilter((0.1, 0.9), "ROUNDS", "OFF").starved(1, 4, 3, seen) == (
        "after 3 rounds of sampling 1 of 4 groups can be trained on: 1 were too easy (mean accuracy above 0.9), 5 too "
        "hard (below 0.1), 0 had no verdict from the judge, 2 failed. Raise ROUNDS, with which this run may go on; a "
        "new one may also start from a better checkpoint, use easier data, or switch the filter off (OFF)."
    )


@pytest.mark.parametrize("exact", [True, False])
def test_rollouts_of_what_transformers_decoded(tmp_path, exact):
    """Rows of one batch, each with its own ids, latents and log-probabilities: as one row alone gives them."""
    make_tiny(tmp_path / "tiny", seed=0)
    model, processor = load(tmp_path / "tiny", force_initial_latent_mode=True, fixed_latent_budget=exact)
    config, scoring = LatentConfig.from_hf(model.config), LatentScoring.build(VMF, "sqrt_dim")
    inputs = processor(text=["where?", "up"], padding=True, padding_side="left", return_tensors="pt")
    generator = torch.Generator().manual_seed(0)
    more = {"policy": scoring.policy, "generator": generator, "temperature": 1.0}
    output = generate(model, inputs, max_new_tokens=20, record_means=True, **more)
    rollouts = rollouts_of(output, config, scoring)
    for i, rollout in enumerate(rollouts):
        ids, forced = output.responses[i], output.forced[i]
        assert torch.equal(rollout.ids, ids) and torch.equal(rollout.latents, output.latents[i])
        # Not an action: the start marker that the checkpoint forces, and end markers that a spent budget forces.
        assert torch.equal(rollout.actions, ~(forced & (ids != config.latent_id)))
        ends = None if exact else output.end_logprobs[i]
        row = (ids, output.logprobs[i], output.latents[i], output.means[i], ends)
        alone = rollout_log_probs(*row, latent_id=config.latent_id, scoring=scoring)
        torch.testing.assert_close(rollout.log_probs, alone, atol=1e-12, rtol=1e-12)
        assert rollout.checked("it") is rollout
        assert rollout.log_probs[~rollout.actions].eq(0).all()
    rollouts[0].log_probs[1] = torch.nan
    with pytest.raises(RuntimeError, match="request 7: a log-probability of its response is not finite"):
        rollouts[0].checked("request 7")


def test_a_sample_has_all_of_its_prompt_and_its_response():
    class Words:
        eos_token_id, pad_token_id = 2, 0

        def decode(self, ids, skip_special_tokens):
            assert not skip_special_tokens
            return " ".join(map(str, ids))

    tokens = LatentTokens(latent=7, start=8, end=9)
    prompt = a_prompt("q", question="Where?", options={"A": "up", "B": "down"}, kind="choice", video="v.mp4")
    latents = torch.arange(12.0).view(3, 4).bfloat16()
    sample = make_sample(Words(), tokens, prompt, rollout_of(torch.tensor([8, 7, 9, 8, 7, 7, 2]), latents), 64)
    assert (sample.text, sample.sample_id, sample.question, sample.kind) == ("8 7 9 8 7 7", "q", "Where?", "choice")
    assert sample.options == {"A": "up", "B": "down"} and sample.ground_truth == "A"
    assert sample.span.tolist() == [0, 1, 1] and sample.latents.dtype == torch.float32
    assert torch.equal(sample.latents, latents.float()) and sample.max_response_length == 64
    assert sample.extra == {"source": "test", "video": "v.mp4"}
