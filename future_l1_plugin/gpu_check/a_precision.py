"""Part a. Does bf16 break the importance ratio?

A rollout records each latent z and the log-probability of what was chosen. The actor recomputes both in another pass:
all tokens at once, other kernels, other neighbours. In exact arithmetic the two agree. In bf16 mu turns by a small
angle, and the ratio of densities of z, which should be 1 before any update, spreads (`la_dapo/tempering.py` has the
table of what an angle does to it). Measured for three pairs of passes over the same rollouts:

    decoding, packed         the rollout against the actor: what `algorithm.rollout_correction` is there for
    packed, one by one       the actor against itself in another micro-batch: nothing corrects this one
    padded, one by one       the same without packing

Rules. float32: 1e-3 rad and 1e-3 nats at most, a hundred times what rounding does and a hundredth of what the smallest
mistake (a latent that is off by one, a wrong mask) does. bf16: the median angle at most 0.1 rad and the median gap of
text log-probabilities at most 0.1 nats: z itself lies at 0.45 rad from mu, and so, or farther, do neighbouring mu, so
above that something is wrong and not merely rounded. And of the actor against itself, with the recipe's tempering
(sqrt_dim), at most one latent in five outside its clip range of 0.1: beyond that much of the clipping would be noise,
and `latent.tempering: dim` (or float32) is what helps.
"""

import math

import torch
from torch import Tensor

from future_l1_plugin.gpu_check.models import FULL, TINY, Shape, build, layers_that_fit
from future_l1_plugin.gpu_check.passes import Computed, Rollouts, decode, packed, padded
from future_l1_plugin.gpu_check.results import Recorder
from future_l1_plugin.la_dapo import LaDapoLoss, Tempering, angle_between, latent_log_prob
from future_l1_plugin.latent import build_policy

EXACT, ROUNDED, OUTSIDE = 1e-3, 0.1, 0.2
POLICY = {"name": "vmf", "mean_cosine": 0.9}  # the recipe's
CORRECTED = "decoding, packed"


def run(results: Recorder, setting) -> None:
    """float32 in a tiny shape, then bf16 in the real one."""
    measure(results, TINY, setting, torch.float32, batch=8, prompt=24, tokens=40)
    if setting.small:
        measure(results, TINY, setting, torch.bfloat16, batch=8, prompt=24, tokens=40)
    else:
        measure(results, FULL, setting, torch.bfloat16, batch=64, prompt=96, tokens=100)


def measure(results: Recorder, shape: Shape, setting, dtype: torch.dtype, batch: int, prompt: int, tokens: int) -> None:
    """Decode, pass over the rollouts in three ways, compare."""
    layers = layers_that_fit(setting.device, shape) if setting.cuda else None
    model = build(shape, setting.device, dtype, layers)
    name = str(dtype).removeprefix("torch.")
    text = model.config.text_config
    results.number(f"{name}: text layers of width {text.hidden_size}", text.num_hidden_layers)
    rollouts, decoding = decode(model, build_policy(**POLICY), batch, prompt, tokens)
    results.number(f"{name}: latents in {batch} responses", len(decoding.mu))
    neighbours = angle_between(decoding.mu[1:], decoding.mu[:-1])
    results.spread(f"{name}: angle of neighbouring mu, for scale", neighbours, "rad")
    ways = {
        "decoding": decoding,
        "packed": packed(model, rollouts),
        "padded": padded(model, rollouts, batch),
        "one by one": padded(model, rollouts, 1),
    }
    for pair in (CORRECTED, "packed, one by one", "padded, one by one"):
        first, second = (ways[way] for way in pair.split(", "))
        compare(results, f"{name}, {pair}", first, second, rollouts, exact=dtype == torch.float32)


def compare(results: Recorder, pair: str, first: Computed, second: Computed, rollouts: Rollouts, exact: bool) -> None:
    """Angles, gaps, and what they make of the ratios."""
    limits = {"max": EXACT} if exact else {"median": ROUNDED}
    results.spread(f"{pair}: angle of mu", angle_between(first.mu, second.mu), "rad", **limits)
    gap = first.text.double() - second.text.double()
    results.spread(f"{pair}: text log-probability, |gap|", gap.abs(), "nats", **limits)
    clip = LaDapoLoss()
    results.number(
        f"{pair}: text ratios outside their clip range", outside(gap, clip.clip_low, clip.clip_high), "of all"
    )
    policy, z = build_policy(**POLICY), torch.cat(rollouts.latents)
    shares = {}
    for rule in ("none", "sqrt_dim", "dim"):
        densities = (latent_log_prob(policy, way.mu, z, Tempering(rule)) for way in (first, second))
        ratio = next(densities) - next(densities)
        shares[rule] = outside(ratio, clip.latent_clip_low, clip.latent_clip_high)
        if rule == "sqrt_dim":
            results.spread(f"{pair}: latent log-ratio, sqrt_dim, |.|", ratio.abs(), "nats")
    judged = not exact and CORRECTED not in pair
    limit = {"sqrt_dim": OUTSIDE} if judged else None
    results.number(f"{pair}: latent ratios outside their clip range", shares, "of all", limit)


def outside(log_ratio: Tensor, low: float, high: float) -> float:
    """The share of ratios outside [1 - low, 1 + high]."""
    return float(((log_ratio < math.log(1 - low)) | (log_ratio > math.log(1 + high))).double().mean())
