"""verl's loss interface for `la_dapo.policy_loss`: unpack a micro-batch, call it, name the metrics."""

from functools import partial
from typing import Any

import torch
from tensordict import TensorDict

from future_l1_plugin.integrations.verl.columns import FIRST, MU, NUM_LATENTS, WEIGHTS, rows
from future_l1_plugin.integrations.verl.host import AggregationType, Metric, no_padding_2_padding, tu
from future_l1_plugin.la_dapo import LaDapoLoss, LatentScoring, LossInputs, kl_at_latents, policy_loss, split_actions


def loss_function(settings: LaDapoLoss, scoring: LatentScoring, latent_id: int, corrected: bool = False):
    """What `worker_group.set_loss_fn` takes. corrected: the batch brings importance weights, under `WEIGHTS`."""
    return partial(la_dapo_loss, settings, scoring, latent_id, corrected=corrected)


def la_dapo_loss(
    settings: LaDapoLoss,
    scoring: LatentScoring,
    latent_id: int,
    model_output: dict[str, Any],
    data: TensorDict,
    dp_group: Any = None,
    corrected: bool = False,
) -> tuple[torch.Tensor, dict[str, Metric]]:
    """The loss of a micro-batch, as a share of its mini-batch over all ranks, and its metrics."""
    log_prob = no_padding_2_padding(model_output["log_probs"], data)  # float64 (B, T)
    entropy = model_output.get("entropy")  # with actor.entropy_coeff or actor.calculate_entropy
    entropy = None if entropy is None else no_padding_2_padding(entropy, data)
    names = ["responses", "response_mask", "old_log_probs", "advantages"]
    names += ["ref_log_prob"] if "ref_log_prob" in data else []
    names += [WEIGHTS] if corrected else []
    padded = data.select(*names).to_padded_tensor()
    text_mask, latent_mask = split_actions(padded["responses"], padded["response_mask"], latent_id)
    kl = None
    if settings.latent_kl_weight:
        # In the batch, what the reference pass left; in the output, the actor's.
        reference = torch.cat([row[: int(n)] for row, n in zip(rows(data[MU]), latent_mask.sum(1), strict=True)])
        kl = kl_at_latents(log_prob, latent_mask, scoring, model_output[MU], reference)
    num_latents = tu.get_non_tensor_data(data, NUM_LATENTS, None)
    inputs = LossInputs(
        log_prob=log_prob,
        old_log_prob=padded["old_log_probs"],
        advantages=padded["advantages"],
        text_mask=text_mask,
        latent_mask=latent_mask,
        num_text=data["batch_num_tokens"] - num_latents,
        num_latents=num_latents,
        ref_log_prob=padded.get("ref_log_prob", None) if settings.kl_weight else None,
        latent_kl=kl,
        entropy=entropy,
        weights=padded[WEIGHTS] if corrected else None,
    )
    found = policy_loss(settings, inputs)
    ranks = data["dp_size"]  # gradients and metrics are averaged over ranks
    metrics = {name: Metric(AggregationType.SUM, value * ranks) for name, value in found.means.items()}
    metrics |= {f"{name}_max": Metric(AggregationType.MAX, value) for name, value in found.maxima.items()}
    if tu.get_non_tensor_data(data, FIRST, False):
        metrics |= {f"{name}_first_max": Metric(AggregationType.MAX, value) for name, value in found.maxima.items()}
    return found.loss * ranks, metrics
