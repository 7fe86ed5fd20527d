"""The LA-DAPO policy loss of Future-L1 (arXiv 2606.05769): clipped policy gradients on tokens and on latents.

    L = L_text + latent_weight L_latent + kl_weight KL_text + latent_kl_weight KL_latent - entropy_weight H_text

Departures from DAPO (arXiv 2503.14476), whose asymmetric clip range and token-mean loss are kept:
1. A response holds two kinds of actions. At a latent position the ratio is that of two densities of the same recorded
   z, r = exp(beta (log p(z | mu_new) - log p(z | mu_old))) (`tempering`), times the probability ratio of going on with
   the span where the model had that choice. It has a clip range of its own, and L_latent a mean of its own: a dozen
   latents would vanish in a mean over hundreds of tokens. A latent whose ratio is clipped passes no gradient, neither
   to mu nor to the choice to go on.
2. Tokens forced by the grammar are not actions: `<|latent|>` ids, and end markers that the budget forced. The latents
   take the place of the former; the latter are in no mask.
3. Two KL penalties towards a reference model, which DAPO drops: for tokens the low-variance estimator (k3), for
   latents the exact KL of the policy.
4. Dual clip for negative advantages (arXiv 1912.09729), for tokens. Latents have none by default: the paper names none,
   and tempered ratios hardly ever reach 3. Without tempering they do: set latent_dual_clip.
The group filter is `filter.keep_group`; overlong shaping is a matter of rewards.

Departures from the paper's public release, all of them fixes:
1. The release's actor never receives the recorded latents: it scores another input than the one that was rolled out.
   Here z goes into the log-density, and hosts feed it through `LatentChannel`.
2. Its latent log-probability is off by one position. Here z_t goes with mu_t, the hidden state one position before.
3. It samples nothing (z = mu), and at its own mode the gradient of a log-density is 0: nothing is explored or learnt.
   Here a stochastic policy draws z; with the deterministic one latents pass no policy gradient at all.
4. Its density is not normalised and its KL is unbounded below: drifting away can earn more than it costs. Here the
   density is normalised and the KL is exact and never negative.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from future_l1_plugin.errors import ConfigError
from future_l1_plugin.la_dapo.actions import LossInputs, LossOutputs

#: Log-ratios are cut to +-20 nats and the k3 estimate to +-10, as in verl: e^20 still fits float32.
MAX_LOG_RATIO, MAX_KL = 20.0, 10.0


@dataclass(frozen=True, kw_only=True)
class LaDapoLoss:
    """Settings of the loss; the defaults are the paper's.

    Args:
        clip_low: token ratios are clipped from below at 1 - clip_low; in (0, 1].
        clip_high: and from above at 1 + clip_high; above 0.
        dual_clip: tokens with a negative advantage A lose at most dual_clip |A|; above 1, None = no limit.
        latent_clip_low: as clip_low, for the tempered ratio of latents.
        latent_clip_high: as clip_high, for the tempered ratio of latents.
        latent_dual_clip: as dual_clip, for latents.
        latent_weight: weight of the latents' policy loss; at least 0.
        kl_weight: weight of the tokens' KL to the reference; at least 0.
        latent_kl_weight: weight of the latents' KL to the reference; at least 0.
        entropy_weight: weight of the tokens' mean entropy, a bonus; at least 0. Latents get none: how far from mu they
            are drawn is a setting of the policy and not learnt.

    Raises:
        ConfigError: a value outside its range.
    """

    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float | None = 3.0
    latent_clip_low: float = 0.1
    latent_clip_high: float = 0.1
    latent_dual_clip: float | None = None
    latent_weight: float = 0.5
    kl_weight: float = 1e-2
    latent_kl_weight: float = 1e-2
    entropy_weight: float = 0.0

    def __post_init__(self) -> None:
        for key in ("clip_low", "latent_clip_low"):
            self._expect(key, "a number in (0, 1]", lambda value: 0 < value <= 1)
        for key in ("clip_high", "latent_clip_high"):
            self._expect(key, "a number above 0", lambda value: 0 < value < math.inf)
        for key in ("dual_clip", "latent_dual_clip"):
            if getattr(self, key) is not None:
                self._expect(key, "a number above 1, or null to switch it off", lambda value: 1 < value < math.inf)
        for key in ("latent_weight", "kl_weight", "latent_kl_weight", "entropy_weight"):
            self._expect(key, "a number of at least 0", lambda value: 0 <= value < math.inf)

    def _expect(self, key: str, expected: str, fits: Callable[[float], bool]) -> None:
        value = getattr(self, key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not fits(value):
            raise ConfigError(f"la_dapo {key}: expected {expected}, found {value!r}")


def policy_loss(settings: LaDapoLoss, batch: LossInputs) -> LossOutputs:
    """The share of one micro-batch in the loss of the whole batch.

    Everything is divided by the batch's counts, so that losses, gradients and metrics of micro-batches and ranks ADD UP
    to those of the batch. A host whose ranks average gradients (DDP, FSDP) multiplies the loss by the number of ranks.
    What stands outside the masks, NaN and infinity included, reaches neither a value nor a gradient.

    Everything is computed in the wider of log_prob's and old_log_prob's dtype, at least float32; float64 is best where
    latents are not tempered.

    Raises:
        ValueError, TypeError: shapes, masks that are not Bool or overlap, a count that is negative, or 0 beside a mask
            that is not empty.
        ConfigError: a KL or an entropy with a weight but without its values.
    """
    _check_tensors(batch)
    _check_masks(batch)
    ref_log_prob, latent_kl, entropy = batch.ref_log_prob, batch.latent_kl, batch.entropy
    if settings.kl_weight and ref_log_prob is None:
        raise ConfigError(
            f"la_dapo: kl_weight={settings.kl_weight:g} needs ref_log_prob, found none. Enable the reference model, or "
            "set kl_weight to 0."
        )
    if settings.latent_kl_weight and batch.num_latents and latent_kl is None:
        raise ConfigError(
            f"la_dapo: latent_kl_weight={settings.latent_kl_weight:g} needs latent_kl, found none. Enable the "
            "reference model and a stochastic latent policy, or set latent_kl_weight to 0."
        )
    if settings.entropy_weight and entropy is None:
        raise ConfigError(
            f"la_dapo: entropy_weight={settings.entropy_weight:g} needs entropy, found none. Have the host compute it, "
            "or set entropy_weight to 0."
        )
    dtype = torch.promote_types(torch.promote_types(batch.log_prob.dtype, batch.old_log_prob.dtype), torch.float32)
    log_prob = batch.log_prob.to(dtype)
    # Subtracted before any narrowing: latents have log-densities of 1e4 nats and log-ratios of 1e-2.
    log_ratio = log_prob - batch.old_log_prob.detach().to(dtype)
    advantages = batch.advantages.detach().to(dtype)
    weights = None if batch.weights is None else batch.weights.detach().to(dtype)

    text_actions, latent_actions = (batch.text_mask, batch.num_text), (batch.latent_mask, batch.num_latents)
    text = _clipped(log_ratio, advantages, weights, *text_actions, settings, "")
    latent = _clipped(log_ratio, advantages, weights, *latent_actions, settings, "latent_")
    loss = text["pg_loss"] + settings.latent_weight * latent["pg_loss"]
    maxima = {"text/ratio_gap": text.pop("ratio_gap"), "latent/ratio_gap": latent.pop("ratio_gap")}

    if ref_log_prob is not None:
        # Schulman's k3, r - log r - 1 with r = p_ref / p: never negative, exact in expectation under p.
        gap = torch.where(batch.text_mask, ref_log_prob.detach().to(dtype) - log_prob, 0.0)
        gap = gap.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        text["kl_ref"] = _mean((gap.expm1() - gap).clamp(-MAX_KL, MAX_KL), *text_actions)
        if settings.kl_weight:
            loss = loss + settings.kl_weight * text["kl_ref"]
    if latent_kl is not None:
        latent["kl_ref"] = _mean(latent_kl.to(dtype), *latent_actions)
        if settings.latent_kl_weight:
            loss = loss + settings.latent_kl_weight * latent["kl_ref"]
    if entropy is not None:
        text["entropy"] = _mean(entropy.to(dtype), *text_actions)
        if settings.entropy_weight:
            loss = loss - settings.entropy_weight * text["entropy"]

    means = {f"text/{key}": value.detach() for key, value in text.items()}
    means |= {f"latent/{key}": value.detach() for key, value in latent.items()}
    return LossOutputs(loss, means, {key: value.detach() for key, value in maxima.items()})


def _clipped(
    log_ratio: Tensor,
    advantages: Tensor,
    weights: Tensor | None,
    mask: Tensor,
    count: float,
    settings: LaDapoLoss,
    prefix: str,
) -> dict[str, Tensor]:
    """PPO's clipped objective (arXiv 1707.06347, equation 7, as a loss) on the positions of `mask`, and its metrics."""
    low, high = getattr(settings, prefix + "clip_low"), getattr(settings, prefix + "clip_high")
    dual = getattr(settings, prefix + "dual_clip")
    # Mask before exp, so that NaN outside the mask cannot reach the gradient.
    log_ratio = torch.where(mask, log_ratio, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high)
    loss = torch.maximum(plain, clipped)
    cut, negative = clipped > plain, advantages < 0
    beyond = torch.zeros_like(negative)
    if dual is not None:
        most = -advantages * dual
        beyond = negative & (loss > most)
        loss = torch.where(negative, torch.minimum(loss, most), loss)
    if weights is not None:
        loss = loss * weights
    return {
        "pg_loss": _mean(loss, mask, count),
        "ratio": _mean(ratio, mask, count),
        "clip_low": _mean((cut & negative).to(ratio), mask, count),
        "clip_high": _mean((cut & ~negative).to(ratio), mask, count),
        "dual_clip": _mean(beyond.to(ratio), mask, count),
        "kl_old": _mean(-log_ratio, mask, count),
        "ratio_gap": (ratio - 1).abs().max() if ratio.numel() else ratio.sum(),  # masked positions have ratio 1
    }


def _mean(values: Tensor, mask: Tensor, count: float) -> Tensor:
    """This micro-batch's share in the mean over `count` positions; 0, still on the graph, where there are none."""
    return torch.where(mask, values, 0.0).sum() / (count or 1)


def _check_tensors(batch: LossInputs) -> None:
    log_prob = batch.log_prob
    if log_prob.ndim != 2 or not log_prob.is_floating_point():
        raise ValueError(
            f"la_dapo log_prob: expected floating (B, T), found {log_prob.dtype} of shape {tuple(log_prob.shape)}"
        )
    for field in fields(batch):
        tensor = getattr(batch, field.name)
        if not field.name.startswith("num_") and tensor is not None and tensor.shape != log_prob.shape:
            raise ValueError(
                f"la_dapo {field.name}: expected the shape of log_prob, {tuple(log_prob.shape)}, found "
                f"{tuple(tensor.shape)}"
            )


def _check_masks(batch: LossInputs) -> None:
    text_mask, latent_mask = batch.text_mask, batch.latent_mask
    for name, mask in (("text_mask", text_mask), ("latent_mask", latent_mask)):
        if mask.dtype != torch.bool:
            raise TypeError(f"la_dapo {name}: expected torch.bool, found {mask.dtype}; convert it with .bool()")
    # Read back together: one wait for the device.
    some_text, some_latents, both = torch.stack(
        [text_mask.any(), latent_mask.any(), (text_mask & latent_mask).any()]
    ).tolist()
    if both:
        row, position = (text_mask & latent_mask).nonzero()[0].tolist()
        raise ValueError(
            f"la_dapo: row {row}, position {position} is in text_mask and in latent_mask; expected disjoint masks. "
            "Take the latent positions out of the text mask: text_mask & ~latent_mask."
        )
    counts = (("num_text", batch.num_text, some_text), ("num_latents", batch.num_latents, some_latents))
    for name, count, some in counts:
        if not 0 <= count < math.inf or (some and not count):
            raise ValueError(
                f"la_dapo {name}: expected the number of positions in the whole batch{', above 0' if some else ''}, "
                f"found {count}. Add up the mask over all micro-batches and ranks."
            )
