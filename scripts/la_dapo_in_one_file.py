#!/usr/bin/env python
"""LA-DAPO from top to bottom, without a trainer: a few steps on the micro world with the package's own parts.

    python scripts/la_dapo_in_one_file.py OUT [--steps 4] [--prompts 4] [--rollouts 8] [--seed 0]

The order of things is that of any host: roll out, reward, advantage, score, loss, step. Read it as the guide to a new
one; verl, EasyR1 and TRL differ from it in who holds the weights and where the tensors travel.

Prints for each step the mean reward and accuracy, and the largest |rollout - actor| log-probability of tokens and of
latents: rounding alone, because both sides compute one density. OUT holds the world and the base; a second run uses
them again.
"""

import argparse
import asyncio
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from future_l1_plugin.data import make_world
from future_l1_plugin.data.prompt import RlPrompt, encode_prompt
from future_l1_plugin.data.rl import load_prompts
from future_l1_plugin.integrations.rl.rollouts import rollouts_of
from future_l1_plugin.integrations.rl.samples import group_rewards, make_sample
from future_l1_plugin.integrations.rl.scoring import padded, score
from future_l1_plugin.la_dapo import (
    LaDapoLoss,
    LatentScoring,
    LossInputs,
    Rollout,
    group_advantage,
    kl_at_latents,
    policy_loss,
    split_actions,
)
from future_l1_plugin.model import LatentConfig, generate, load
from future_l1_plugin.model.batch import left_padded
from future_l1_plugin.model.tiny import copy_micro_base
from future_l1_plugin.rewards import RewardSet

SCORING = LatentScoring.build({"name": "vmf", "mean_cosine": 0.95}, "sqrt_dim")
LOSS = LaDapoLoss()  # the paper's values
REWARDS = RewardSet.from_config(
    [
        {"term": "accuracy", "weight": 0.9},
        {"term": "format", "weight": 0.1},
        {"term": "r_ctr", "weight": 0.2},
        {"term": "r_div", "weight": 0.1},
        {"term": "repetition", "weight": 1.0, "n": 1},  # the micro base is hardly ever right: so that groups differ
    ]
)
LONGEST = 40  # tokens of a response


class Policy:
    """The model that is trained, or the reference: rolls out, and says how likely the actions of a rollout are."""

    def __init__(self, model: nn.Module, processor: Any) -> None:
        self.model, self.processor = model, processor
        self.config = LatentConfig.from_hf(model.config)
        self.pad = processor.tokenizer.pad_token_id

    @torch.no_grad()
    def roll_out(self, prompts: list[RlPrompt], generator: torch.Generator) -> tuple[dict[str, Tensor], list[Rollout]]:
        """The prompts' batch, left-padded, and a rollout for each."""
        inputs = left_padded([encode_prompt(prompt, self.processor).inputs for prompt in prompts], self.pad)
        output = generate(
            self.model,
            inputs,
            policy=SCORING.policy,
            max_new_tokens=LONGEST,
            temperature=1.0,
            generator=generator,
            record_means=True,
        )
        return inputs, rollouts_of(output, self.config, SCORING)

    def score(self, inputs: dict[str, Tensor], rollouts: list[Rollout]) -> tuple[Tensor, Tensor]:
        """Log-probabilities float64 (B, T) of the actions, and mu (K, H) at the latents; both with gradients."""
        return score(self.model, self.config, SCORING, inputs, rollouts, temperature=1.0)


async def rewarded(policy: Policy, prompts: list[RlPrompt], rollouts: list[Rollout]) -> tuple[list[float], list[float]]:
    """Each response's total reward, and whether it is right."""
    tokenizer, tokens = policy.processor.tokenizer, policy.config.tokens
    samples = [make_sample(tokenizer, tokens, *pair, LONGEST) for pair in zip(prompts, rollouts, strict=True)]
    scores = [await REWARDS.score_sample(sample) for sample in samples]
    found = group_rewards(REWARDS, samples, scores, [prompt.id for prompt in prompts])
    return found.totals, found.terms["accuracy"]


def train(out: Path, steps: int, prompts: int, rollouts: int, seed: int) -> list[dict[str, float]]:
    """What each step reports."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    world = make_world(out / "world", test=64, train=0, perception=0, seed=seed, progress=False)
    base = out / "base" if (out / "base").exists() else copy_micro_base(out / "base")
    # The base was never shown a span; its checkpoint may say that each response begins with one.
    model, processor = load(base, dtype=torch.float32, force_initial_latent_mode=True)
    actor, reference = Policy(model, processor), Policy(deepcopy(model).requires_grad_(False), processor)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    questions = load_prompts(world.futurebench, video_root=world.videos, num_frames=4)
    reports = []
    for step in range(steps):
        first = step * prompts
        asked = [questions[(first + i) % len(questions)] for i in range(prompts) for _ in range(rollouts)]
        inputs, drawn = actor.roll_out(asked, generator)
        totals, correct = asyncio.run(rewarded(actor, asked, drawn))
        advantage = group_advantage(torch.tensor(totals), [prompt.id for prompt in asked])

        ids, actions = padded([r.ids for r in drawn], actor.pad), padded([r.actions for r in drawn], False)
        text, latent = split_actions(ids, actions, actor.config.latent_id)
        with torch.no_grad():
            old, _ = actor.score(inputs, drawn)
            ref_log_prob, mu_ref = reference.score(inputs, drawn)
        log_prob, mu = actor.score(inputs, drawn)
        batch = LossInputs(
            log_prob=log_prob,
            old_log_prob=old,
            advantages=advantage[:, None].expand_as(log_prob),
            text_mask=text,
            latent_mask=latent,
            num_text=int(text.sum()),
            num_latents=int(latent.sum()),
            ref_log_prob=ref_log_prob,
            latent_kl=kl_at_latents(log_prob, latent, SCORING, mu, mu_ref),
        )
        found = policy_loss(LOSS, batch)
        optimiser.zero_grad()
        found.loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()

        gap = (padded([r.log_probs for r in drawn], 0.0) - old).abs()
        reports.append(
            {
                "reward": sum(totals) / len(totals),
                "accuracy": sum(correct) / len(correct),
                "rollout_gap/text_max": float((gap * text).max()),
                "rollout_gap/latent_max": float((gap * latent).max()),
                "latent/kl_ref": float(found.means["latent/kl_ref"]),
                "grad_norm": float(norm),
            }
        )
        print(
            f"step {step + 1}: " + ", ".join(f"{name} {value:.4g}" for name, value in reports[-1].items()), flush=True
        )
    return reports


def main(argv: list[str] | None = None) -> list[dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for the micro world and the base")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=4, help="prompts of a step")
    parser.add_argument("--rollouts", type=int, default=8, help="responses to a prompt")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    return train(arguments.out, arguments.steps, arguments.prompts, arguments.rollouts, arguments.seed)


if __name__ == "__main__":
    main()
