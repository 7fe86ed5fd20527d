"""The same rollouts, computed in several ways: mu at each latent, log-probability of each token that was chosen.

`decode` with a key-value cache, token by token; the others in one teacher-forced pass through `LatentChannel`, as
the actor computes them. Rows of what they return lie in one order, so that they can be compared element by element.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LogitsProcessorList

from future_l1_plugin.gpu_check.models import OpenSpans, prompts
from future_l1_plugin.latent import LatentChannel, SpanBudget
from future_l1_plugin.latent.policy_base import Policy
from future_l1_plugin.model.config import LatentConfig
from future_l1_plugin.model.decode import generate


@dataclass(frozen=True)
class Rollouts:
    """prompts, responses: Long (P_i,), (T_i,); latents (k_i, H); forced Bool (T_i,): ids that the grammar chose."""

    prompts: list[Tensor]
    responses: list[Tensor]
    latents: list[Tensor]
    forced: list[Tensor]
    temperature: float

    @property
    def chosen(self) -> Tensor:
        """Bool, over all responses end to end: tokens that the model chose."""
        return ~torch.cat(self.forced)


@dataclass(frozen=True)
class Computed:
    """mu (K, H) at the latents; text: float32 (N,), log-probabilities of the chosen tokens, in nats."""

    mu: Tensor
    text: Tensor


@torch.no_grad()
def decode(model: nn.Module, policy: Policy, batch: int, prompt: int, tokens: int) -> tuple[Rollouts, Computed]:
    """Sample `batch` responses of `tokens` tokens, two spans each, to prompts of up to `prompt` tokens."""
    latent = LatentConfig.from_hf(model.config)
    inputs = prompts(model, batch, prompt // 2, prompt)
    temperature = 0.9
    output = generate(
        model,
        inputs,
        policy=policy,
        temperature=temperature,
        max_new_tokens=tokens,
        budget=SpanBudget(tokens // 5, exact=True),
        record_means=True,
        logits_processor=LogitsProcessorList([OpenSpans(latent.latent_start_id, prompt, (0, tokens // 2))]),
        generator=torch.Generator(model.device).manual_seed(0),
    )
    kept = [row[mask.bool()] for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    rollouts = Rollouts(kept, output.responses, output.latents, output.forced, temperature)
    return rollouts, Computed(torch.cat(output.means), torch.cat(output.logprobs)[rollouts.chosen])


@torch.no_grad()
def packed(model: nn.Module, rollouts: Rollouts) -> Computed:
    """All rows end to end in one row, told apart by their positions, as with `use_remove_padding`."""
    rows = [torch.cat(pair) for pair in zip(rollouts.prompts, rollouts.responses, strict=True)]
    device, lengths = rows[0].device, [len(row) for row in rows]
    positions = torch.cat([torch.arange(n, device=device) for n in lengths])
    start = torch.tensor([len(row) for row in rollouts.prompts], device=device)
    where = positions >= start.repeat_interleave(torch.tensor(lengths, device=device))
    with LatentChannel(model, LatentConfig.from_hf(model.config).tokens) as channel:
        channel.feed(rollouts.latents, where=where[None])
        logits = model(
            input_ids=torch.cat(rows)[None],
            position_ids=positions.expand(4, 1, -1),  # one for text, three for M-RoPE
            use_cache=False,
        ).logits[0]
        ends = torch.tensor(lengths).cumsum(0).tolist()
        before = [logits[end - len(r) - 1 : end - 1] for end, r in zip(ends, rollouts.responses, strict=True)]
        return Computed(channel.mu, _text(before, rollouts))


@torch.no_grad()
def padded(model: nn.Module, rollouts: Rollouts, batch: int) -> Computed:
    """`batch` rows at a time, left-padded to the longest."""
    means, before = [], []
    tokens = LatentConfig.from_hf(model.config).tokens
    for first in range(0, len(rollouts.prompts), batch):
        part = slice(first, first + batch)
        responses = rollouts.responses[part]
        rows = [torch.cat(pair) for pair in zip(rollouts.prompts[part], responses, strict=True)]
        longest = max(map(len, rows))
        ids = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in rows])
        mask = torch.stack([torch.arange(longest, device=ids.device) >= longest - len(row) for row in rows]).long()
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with LatentChannel(model, tokens) as channel:
            channel.feed(rollouts.latents[part], longest - torch.tensor([len(r) for r in responses]))
            logits = model(
                input_ids=ids, attention_mask=mask, position_ids=positions.expand(4, -1, -1), use_cache=False
            ).logits
            means.append(channel.mu)
        before += [row[longest - len(r) - 1 : longest - 1] for row, r in zip(logits, responses, strict=True)]
        before[-len(rows) :] = [row.clone() for row in before[-len(rows) :]]  # the padding's logits can go
    return Computed(torch.cat(means), _text(before, rollouts))


def _text(before: list[Tensor], rollouts: Rollouts) -> Tensor:
    """Log-probabilities of the chosen tokens from the logits (T_i, V) one position before each token."""
    found = []
    for logits, ids in zip(before, rollouts.responses, strict=True):
        scaled = logits.float() / rollouts.temperature
        found.append(scaled.gather(1, ids[:, None]).squeeze(1) - scaled.logsumexp(-1))
    return torch.cat(found)[rollouts.chosen]
