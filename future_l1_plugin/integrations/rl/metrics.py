"""What a step reports about latents, rollouts and groups: one table of names for every host.

Names are stable: plots and tests read them. `python -m future_l1_plugin.integrations.rl` prints the table.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from re import escape, fullmatch

import torch
from torch import Tensor

from future_l1_plugin.la_dapo import Rollout, split_actions
from future_l1_plugin.latent import LatentTokens, spans_of
from future_l1_plugin.rewards import Sample, mean_adjacent_cosine


@dataclass(frozen=True)
class Metric:
    """A row of the table. name: `{a,b}` is one of these, `*` a name of the recipe's. hosts: those that report it."""

    name: str
    unit: str
    population: str
    meaning: str
    hosts: tuple[str, ...] = ("verl", "EasyR1", "TRL")

    def matches(self, name: str) -> bool:
        parts = escape(self.name).replace(r"\*", ".+").replace(r"\{", "(").replace(r"\}", ")").replace(",", "|")
        return fullmatch(parts, name) is not None


_TRAINED, _SAMPLED = "responses trained on", "groups sampled in the step, kept or not"
_ACTIONS = "tokens, or latents, of the responses trained on"
_VERL, _RAY = ("verl",), ("verl", "EasyR1")

METRICS = (
    Metric("latent/spans_per_response", "spans", _TRAINED, "mean number of latent spans"),
    Metric("latent/latents_per_span", "latents", "spans of the responses trained on", "mean length of a span"),
    Metric("latent/responses_with_span", "share", _TRAINED, "responses with a span"),
    Metric(
        "latent/adjacent_cosine", "cosine", "responses trained on with two spans or more", "of the means of neighbours"
    ),
    Metric("reward", "reward", _TRAINED, "mean total reward", ("verl", "TRL")),
    Metric("reward/overall", "reward", _TRAINED, "mean total reward (its log is nested)", ("EasyR1",)),
    Metric("reward/*", "the term's", _TRAINED, "mean of a reward term before its weight, or of what it reports beside"),
    Metric("groups/accuracy", "share", f"{_SAMPLED}; those without a verdict left out", "mean of their mean accuracy"),
    Metric("groups/{too_easy,too_hard,no_verdict}", "groups", _SAMPLED, "left out, by the reason"),
    Metric("groups/{failed,filtered}", "groups", _SAMPLED, "that could not be rolled out; left out in all", _VERL),
    Metric("groups/{rounds,surplus}", "rounds, groups", "the step", "rounds of sampling; good groups too many", _RAY),
    Metric(
        "rollout_gap/{text,latent}_{mean,p50,p99,max}",
        "nats (latents: tempered)",
        _ACTIONS,
        "|log-prob of the rollout - of the actor before the update|; EasyR1 and TRL: the greatest",
    ),
    Metric(
        "rollout_gap/angle_{mean,p50,p99,max}",
        "radians",
        "latents of the responses trained on",
        "between the rollout's mu and the actor's",
        _VERL,
    ),
    Metric(
        "rollout_correction/{text,latent}_{mean,truncated}",
        "weight, share",
        _ACTIONS,
        "mean importance weight; weights that a bound changed",
        _VERL,
    ),
    Metric(
        "actor/{text,latent}/{pg_loss,ratio,clip_low,clip_high,dual_clip,kl_old,kl_ref,entropy}",
        "as in `la_dapo.LossOutputs`",
        f"{_ACTIONS}, mean over the updates of the step",
        "the parts of the loss",
    ),
    Metric(
        "actor/{text,latent}/ratio_gap{_max,_first_max}",
        "ratio",
        f"{_ACTIONS}; first: of the step's first update",
        "largest |ratio - 1|; before any update it is rounding alone",
        _RAY,
    ),
    Metric("actor/grad_norm", "norm", "the step's updates", "mean norm of the gradient before it is clipped", _RAY),
    Metric("grad_norm", "norm", "the last update", "the Trainer's own name for the same", ("TRL",)),
    Metric("rollout/engines_per_group", "engines", _TRAINED, "engines that a group came from; 1: one prefill", _VERL),
    Metric("rollout/busiest_engine", "share", _TRAINED, "of the engine that answered most", _VERL),
    Metric("pixels/{prompts,gib}", "prompts, GiB", "the step", "held in the object store at its end", _VERL),
    Metric("actor/ranks_per_group", "ranks", "groups trained on", "ranks among which a group is spread", _VERL),
    Metric("global_seqlen/balanced_{min,max}", "tokens", "ranks", "of the rank with the fewest and the most", _VERL),
    Metric("val-aux/*/questions", "questions", "a validation", "asked of a source, for its standard error", _VERL),
    Metric("val-aux/failed", "questions", "a validation", "that could not be answered", _VERL),
)


def span_metrics(samples: Sequence[Sample], tokens: LatentTokens) -> dict[str, float]:
    """Spans per response, latents per span, share of responses with a span, mean cosine of adjacent spans."""
    spans = [spans_of(sample.response_ids.tolist(), tokens) for sample in samples]
    held = [length for found in spans for _, length, _ in found]
    cosines = [mean_adjacent_cosine(sample.latents, sample.span) for sample in samples]
    cosines = [cosine for cosine in cosines if cosine is not None]
    metrics = {
        "latent/spans_per_response": len(held) / len(samples),
        "latent/latents_per_span": sum(held) / max(1, len(held)),
        "latent/responses_with_span": sum(map(bool, spans)) / len(samples),
    }
    return metrics | ({"latent/adjacent_cosine": sum(cosines) / len(cosines)} if cosines else {})


def log_prob_gaps(rollouts: Sequence[Rollout], actor: Sequence[Tensor], tokens: LatentTokens) -> dict[str, float]:
    """|rollout log-prob - actor log-prob| in nats (latents: tempered) of actions, text and latents apart.

    Their mean, median, the value that one in a hundred exceeds, and the largest. actor: (T_i,) for each rollout.
    """
    gap = (torch.cat([r.log_probs for r in rollouts]).double() - torch.cat(list(actor)).double()).abs()
    found = {}
    for name, where in zip(("text", "latent"), flat_actions(rollouts, tokens), strict=True):
        if where.any():
            found |= _spread(f"rollout_gap/{name}", gap[where])
    return found


def flat_actions(rollouts: Sequence[Rollout], tokens: LatentTokens) -> tuple[Tensor, Tensor]:
    """`split_actions` of all rollouts, end to end: Bool (n,) each."""
    ids, actions = (torch.cat([getattr(r, name) for r in rollouts]) for name in ("ids", "actions"))
    return split_actions(ids, actions, tokens.latent)


def angle_gaps(angles: Sequence[Tensor]) -> dict[str, float]:
    """Radians between the rollout's mu and the actor's at each latent: the same figures. Rows (k_i, 1)."""
    every = torch.cat([row.flatten() for row in angles])
    return _spread("rollout_gap/angle", every.double()) if len(every) else {}


def _spread(name: str, values: Tensor) -> dict[str, float]:
    ordered = values.sort().values  # torch.quantile takes at most 16 million
    at = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    picked = {f"{name}_{key}": float(ordered[round(share * (len(ordered) - 1))]) for key, share in at.items()}
    return {f"{name}_mean": float(values.mean())} | picked


def engine_metrics(prompts: Sequence[str], engines: Sequence[int]) -> dict[str, float]:
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
