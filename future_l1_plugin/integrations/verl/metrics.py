"""What a step reports about its latents. Names are stable: plots and tests read them."""

from collections import Counter

import torch
from torch import Tensor

from future_l1_plugin.latent import LatentTokens, spans_of
from future_l1_plugin.rewards import Sample, mean_adjacent_cosine


def span_metrics(samples: list[Sample], tokens: LatentTokens) -> dict[str, float]:
    """Spans a response, latents a span, share of responses with a span, mean cosine of adjacent spans."""
    spans = [spans_of(sample.response_ids.tolist(), tokens) for sample in samples]
    held = [length for found in spans for _, length, _ in found]
    cosines = [mean_adjacent_cosine(sample.latents, sample.span) for sample in samples]
    cosines = [cosine for cosine in cosines if cosine is not None]
    metrics = {
        "latent/spans_a_response": len(held) / len(samples),
        "latent/latents_a_span": sum(held) / max(1, len(held)),
        "latent/responses_with_span": sum(map(bool, spans)) / len(samples),
    }
    return metrics | ({"latent/adjacent_cosine": sum(cosines) / len(cosines)} if cosines else {})


def log_prob_gaps(
    responses: list[Tensor],
    masks: list[Tensor],
    rollout: list[Tensor],
    actor: list[Tensor],
    tokens: LatentTokens,
) -> dict[str, float]:
    """|rollout log-prob - actor log-prob| in nats (latents: tempered) on trained positions, text and latents apart.

    Their mean, median, the value that one in a hundred exceeds, and the largest.
    """
    ids, mask = torch.cat(responses), torch.cat(masks).bool()
    gap = (torch.cat(rollout).double() - torch.cat(actor).double()).abs()
    is_latent = ids == tokens.latent
    found = {}
    for name, where in (("text", mask & ~is_latent), ("latent", mask & is_latent)):
        if where.any():
            found |= _spread(f"rollout_gap/{name}", gap[where])
    return found


def angle_gaps(angles: list[Tensor]) -> dict[str, float]:
    """Radians between the rollout's mu and the actor's at each latent: the same figures. Rows (k_i, 1)."""
    every = torch.cat([row.flatten() for row in angles])
    return _spread("rollout_gap/angle", every.double()) if len(every) else {}


def _spread(name: str, values: Tensor) -> dict[str, float]:
    ordered = values.sort().values  # torch.quantile takes at most 16 million
    at = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    picked = {f"{name}_{key}": float(ordered[round(share * (len(ordered) - 1))]) for key, share in at.items()}
    return {f"{name}_mean": float(values.mean())} | picked


def engine_metrics(prompts: list[str], engines: list[int]) -> dict[str, float]:
    """Rollout engines that a group's rollouts came from (1: they shared one prefill), and the busiest engine's share.

    prompts: the prompt of each rollout. engines: the number of the engine that answered it.
    """
    of_group: dict[str, set[int]] = {}
    for prompt, engine in zip(prompts, engines, strict=True):
        of_group.setdefault(prompt, set()).add(engine)
    return {
        "rollout/engines_per_group": sum(map(len, of_group.values())) / len(of_group),
        "rollout/busiest_engine": Counter(engines).most_common(1)[0][1] / len(engines),
    }
