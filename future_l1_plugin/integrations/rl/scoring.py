"""What a model makes of finished rollouts, for the hosts that run transformers themselves."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from future_l1_plugin.la_dapo import LatentScoring, Rollout, action_log_probs
from future_l1_plugin.latent import LatentChannel, continue_log_prob_at
from future_l1_plugin.model import LatentConfig


def padded(rows: Sequence[Tensor], value: float = 0) -> Tensor:
    """Rows (T_i,) or (T_i, ..) as (B, T, ..), filled at the end."""
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)


def score(
    model: nn.Module,
    config: LatentConfig,
    scoring: LatentScoring,
    inputs: dict[str, Tensor],
    rollouts: Sequence[Rollout],
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """How likely a model's own actions are, the recorded latents fed in their places.

    Args:
        model: a stock Qwen3-VL, also within a wrapper that hands arguments on.
        inputs: of the prompts, left-padded (`model.batch.left_padded`), on the model's device.
        rollouts: one for each prompt, on the model's device.
        temperature: at which they were drawn, above 0.

    Returns:
        Log-probabilities float64 (B, T) in nats (`action_log_probs`), T the longest response: what stands where nothing
        was chosen is of no use. And mu (K, H) at the latents, in reading order. Both with their graph.
    """
    ids, answered = padded([r.ids for r in rollouts]), padded([torch.ones_like(r.ids) for r in rollouts])
    more = {"input_ids": ids, "attention_mask": answered, "mm_token_type_ids": torch.zeros_like(ids)}
    fed = inputs | {name: torch.cat([inputs[name], rows], 1) for name, rows in more.items()}
    # The latents of the rollout are fed again; the channel reads mu one position before each.
    channel = LatentChannel(model, config.tokens)
    channel.feed([r.latents for r in rollouts], inputs["input_ids"].shape[1])
    with channel:
        logits = model(**fed, use_cache=False, logits_to_keep=ids.shape[1] + 1).logits[:, :-1]
    logits = (logits / temperature).contiguous()
    at, went_on = (ids == config.latent_id) & answered.bool(), None
    if not config.budget.exact:  # the model could have ended the span, and did not
        places = at.flatten().nonzero().squeeze(1)
        divided_already = torch.ones_like(places, dtype=torch.float32)
        logits, went_on = continue_log_prob_at(logits, places, config.latent_end_id, divided_already)
    tokens = logits.log_softmax(-1).gather(2, ids[..., None]).squeeze(2)
    latents = torch.cat([r.latents for r in rollouts])
    return action_log_probs(tokens, at, scoring, channel.mu, latents, went_on), channel.mu
