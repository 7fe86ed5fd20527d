"""Part c. What the actor computes on a GPU: one LA-DAPO step under bf16 autocast, jagged batches, memory.

Gradients   The same rollouts, weights in float32, through `LatentChannel`, the tempered density, log(1 - p(end)), the
            KL and the policy loss, once in float32 and once under bf16 autocast. Rules: every gradient is there and
            finite; the loss differs by at most 0.05; over all parameters the two gradients point the same way (1 -
            cosine at most 0.05, where latents that are off by one give 0.3).
Densities   Density and KL of the same mu must not feel autocast: equal bit by bit.
Jagged      The nested-tensor calls by which verl's batches are padded and flattened, against a loop: equal, gradients
            included.
Memory      `continue_log_prob_at` for 2,048 latents among 16,384 positions of 151,936 logits in bf16 (4.6 GiB): at most
            1 GiB beside the logits and the gradient that the text's loss makes anyway. Indexing rows out of the logits
            takes a second gradient of their size.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from future_l1_plugin.gpu_check.models import MIDDLE, TINY, build
from future_l1_plugin.gpu_check.passes import Rollouts, decode
from future_l1_plugin.gpu_check.results import Recorder
from future_l1_plugin.la_dapo import (
    LaDapoLoss,
    LatentScoring,
    LossInputs,
    action_log_probs,
    continue_log_prob,
    continue_log_prob_at,
    kl_at_latents,
    latent_kl,
    latent_log_prob,
    policy_loss,
)
from future_l1_plugin.latent import LatentChannel, build_policy
from future_l1_plugin.model.backbone import core_of
from future_l1_plugin.model.config import LatentConfig

SCORING = LatentScoring.build({"name": "vmf", "mean_cosine": 0.9}, "sqrt_dim")  # the recipe's
POLICY, TEMPERING = SCORING.policy, SCORING.tempering
LOSS_GAP, GRADIENT_GAP, ADDED_GIB = 0.05, 0.05, 1.0
END = 3  # an id, in the memory test


def run(results: Recorder, setting) -> None:
    """Gradients, densities, jagged batches, memory."""
    gradients(results, setting)
    densities(results, setting)
    jagged(results, setting.device)
    memory(results, setting)


# ---- gradients ------------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """ids Long (B, P + T), mask, positions of B rollouts with responses of one length T; the rest (B, T) but for the
    latents; `old`, `reference`, `mu_reference` are what a rollout and a reference model would have left."""

    ids: Tensor
    mask: Tensor
    latents: list[Tensor]
    text: Tensor
    latent: Tensor
    advantages: Tensor
    old: Tensor
    reference: Tensor
    mu_reference: Tensor


def gradients(results: Recorder, setting) -> None:
    """One step in float32 and one under autocast."""
    model = build(TINY if setting.small else MIDDLE, setting.device, torch.float32)
    rollouts, _ = decode(model, POLICY, *((8, 24, 40) if setting.small else (32, 64, 80)))
    batch = as_batch(model, rollouts)
    found = {}
    tower = core_of(model).family.vision
    for name, autocast in (("float32", False), ("bf16 autocast", True)):
        model.zero_grad()
        with torch.autocast(setting.device.type, torch.bfloat16, enabled=autocast):
            loss = step(model, batch)
        loss.backward()
        wanted = [(n, p) for n, p in model.named_parameters() if tower not in n]  # no picture in these prompts
        bad = [n for n, p in wanted if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()]
        results.check(f"{name}: every gradient is there and finite", not bad, f"{len(bad)}, such as {bad[:1]}")
        found[name] = float(loss.detach()), [p.grad.clone() for _, p in wanted]
    (loss, gradient), (other_loss, other) = found.values()
    results.number("loss: |bf16 autocast - float32|", abs(other_loss - loss), most=LOSS_GAP)
    norm, other_norm = dot(gradient, gradient) ** 0.5, dot(other, other) ** 0.5
    results.number("gradient: 1 - cosine of the two", 1 - dot(gradient, other) / norm / other_norm, most=GRADIENT_GAP)
    results.number("gradient: ratio of the norms", other_norm / norm)


def dot(a: list[Tensor], b: list[Tensor]) -> float:
    """In float64: float32 loses percents of a sum over 1e8 parameters."""
    return sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))


def as_batch(model: nn.Module, rollouts: Rollouts) -> Batch:
    """Rollouts, and an actor, old and reference that differ by what a step or two make of them."""
    responses, device = torch.stack(rollouts.responses), model.device
    longest = max(map(len, rollouts.prompts))
    prompts = [torch.nn.functional.pad(row, (longest - len(row), 0)) for row in rollouts.prompts]
    mask = torch.stack([torch.arange(longest, device=device) >= longest - len(row) for row in rollouts.prompts])
    is_latent = responses == LatentConfig.from_hf(model.config).latent_id
    draw = torch.Generator(device).manual_seed(1)
    batch = Batch(
        ids=torch.cat([torch.stack(prompts), responses], 1),
        mask=torch.cat([mask, torch.ones_like(responses, dtype=torch.bool)], 1).long(),
        latents=rollouts.latents,
        text=~torch.stack(rollouts.forced),
        latent=is_latent,
        advantages=torch.randn(len(responses), 1, device=device, generator=draw).expand_as(responses).contiguous(),
        old=torch.empty(0),
        reference=torch.empty(0),
        mu_reference=torch.empty(0),
    )
    with torch.no_grad():
        log_probs, mu = forward(model, batch)

    def near(values: Tensor, by: float) -> Tensor:
        noise = torch.randn(values.shape, device=device, generator=draw, dtype=torch.float64)
        return values + by * noise.to(values.dtype)

    return batch._replace(old=near(log_probs, 0.05), reference=near(log_probs, 0.05), mu_reference=near(mu, 0.05))


def forward(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-probabilities float64 (B, T) of tokens and latents, and mu (K, H), with gradients."""
    tokens, length = LatentConfig.from_hf(model.config).tokens, batch.text.shape[1]
    start = batch.ids.shape[1] - length
    positions = (batch.mask.cumsum(-1) - 1).clamp(min=0).expand(4, -1, -1)
    with LatentChannel(model, tokens) as channel:
        channel.feed(batch.latents, start)
        logits = model(batch.ids, attention_mask=batch.mask, position_ids=positions, use_cache=False).logits
    logits = logits[:, start - 1 : -1].contiguous()  # (B, T, V), of the position before each
    at = batch.latent.flatten().nonzero().squeeze(1)
    logits, went_on = continue_log_prob_at(logits, at, tokens.end, torch.ones_like(at, dtype=torch.float32))
    text = logits.float().log_softmax(-1).gather(2, batch.ids[:, start:, None]).squeeze(2)
    latents = torch.cat(batch.latents)
    return action_log_probs(text, batch.latent, SCORING, channel.mu, latents, went_on), channel.mu


def step(model: nn.Module, batch: Batch) -> Tensor:
    """The policy loss of the batch."""
    log_prob, mu = forward(model, batch)
    inputs = LossInputs(
        log_prob=log_prob,
        old_log_prob=batch.old,
        advantages=batch.advantages,
        text_mask=batch.text,
        latent_mask=batch.latent,
        num_text=int(batch.text.sum()),
        num_latents=int(batch.latent.sum()),
        ref_log_prob=batch.reference,
        latent_kl=kl_at_latents(log_prob, batch.latent, SCORING, mu, batch.mu_reference),
    )
    return policy_loss(LaDapoLoss(), inputs).loss


# ---- densities, jagged batches --------------------------------------------------------------------------------------


def densities(results: Recorder, setting) -> None:
    """Density and KL of one mu, within autocast and without."""
    draw = torch.Generator().manual_seed(0)
    mu = torch.randn(64, 128 if setting.small else 4096, generator=draw).to(setting.device, torch.bfloat16)
    for policy in (POLICY, build_policy("gaussian", sigma=0.5)):
        z, other = policy.sample(mu), mu.roll(1, 0)
        found = []
        for autocast in (False, True):
            with torch.autocast(setting.device.type, torch.bfloat16, enabled=autocast):
                found += [latent_log_prob(policy, mu, z, TEMPERING), latent_kl(policy, mu, other, TEMPERING)]
        same = torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])
        results.check(f"{policy.name}: density and KL do not feel autocast", same)


def jagged(results: Recorder, device: torch.device) -> None:
    """values (n,) and offsets to (B, T) and back, as integrations/verl/batch.py and verl do it."""
    lengths = [3, 7, 0, 1, 5]
    offsets = torch.tensor([0, *lengths], device=device).cumsum(0)
    shape = (len(lengths), max(lengths) + 2)
    for dtype in (torch.float64, torch.int64, torch.bool):
        values = torch.arange(sum(lengths), device=device).remainder(2 if dtype == torch.bool else 99).to(dtype)
        wanted = torch.zeros(shape, dtype=dtype, device=device)
        for row, part in enumerate(values.split(lengths)):
            wanted[row, : len(part)] = part
        nested = torch.nested.nested_tensor_from_jagged(values, offsets)
        found = torch.nested.to_padded_tensor(nested, padding=0, output_size=shape)
        back = torch.cat([row[:n] for row, n in zip(nested.unbind(), lengths, strict=True)])
        same = torch.equal(found, wanted) and torch.equal(back, values)
        results.check(f"jagged to padded and back, {str(dtype).removeprefix('torch.')}", same)
    values = torch.arange(float(sum(lengths)), device=device, dtype=torch.float64, requires_grad=True)
    nested = torch.nested.nested_tensor_from_jagged(values, offsets)
    torch.nested.to_padded_tensor(nested, padding=0.0, output_size=shape).square().sum().backward()
    results.check("jagged to padded, gradient", torch.equal(values.grad, 2 * values.detach()))


# ---- memory ---------------------------------------------------------------------------------------------------------


class _TextLoss(torch.autograd.Function):
    """In the place of the text's loss: a gradient of the logits' size, in a buffer of its own, and nothing else."""

    @staticmethod
    def forward(ctx, logits: Tensor) -> Tensor:
        ctx.like = logits
        return logits.new_zeros(())

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return torch.full_like(ctx.like, 1e-6)


def memory(results: Recorder, setting) -> None:
    """What log(1 - p(end)) takes; and that it is the same as by indexing."""
    positions, latents, vocabulary = (256, 32, 512) if setting.small else (16384, 2048, 151936)
    dtype = torch.bfloat16 if setting.cuda else torch.float32
    draw = torch.Generator(setting.device).manual_seed(0)
    logits = torch.randn(positions, vocabulary, device=setting.device, generator=draw, dtype=dtype)
    logits[:, END] += math.log(vocabulary)  # p(end) is then about as likely as not
    logits.requires_grad_()
    at = torch.randperm(positions, device=setting.device, generator=draw)[:latents]
    ones = torch.ones(latents, device=setting.device)

    def without() -> Tensor:
        return _TextLoss.apply(logits)

    def ours() -> Tensor:
        through, values = continue_log_prob_at(logits, at, END, ones)
        return _TextLoss.apply(through) + values.sum()

    def by_indexing() -> Tensor:
        return _TextLoss.apply(logits) + continue_log_prob(logits[at], END).sum()

    peaks, few = {}, {}
    for way in (without, ours, by_indexing):
        peaks[way.__name__], gradient = peak_gib(way, logits)
        few[way.__name__] = gradient[at[:64]].float()
        del gradient
    gap = (few["ours"] - few["by_indexing"]).abs().max() / few["by_indexing"].abs().max()
    results.number("log(1 - p(end)): gradient against indexing, relative", gap, most=1e-2 if setting.cuda else 1e-5)
    if not setting.cuda:
        results.skip("log(1 - p(end)): peak memory", "needs a CUDA device")
        return
    limit = None if setting.small else ADDED_GIB
    added = {way: peaks[way] - peaks["without"] for way in ("ours", "by_indexing")}
    results.number("log(1 - p(end)): memory it adds", added["ours"], "GiB", limit)
    results.number("log(1 - p(end)): memory indexing would add", added["by_indexing"], "GiB")
    results.number("peak with logits and their gradient", peaks["ours"], "GiB")


def peak_gib(loss: Callable[[], Tensor], logits: Tensor) -> tuple[float, Tensor]:
    """GiB allocated at the worst moment of a loss and its backward pass, 0 on a CPU; and the gradient of the logits."""
    if not logits.is_cuda:
        return 0.0, torch.autograd.grad(loss(), logits)[0]
    torch.cuda.reset_peak_memory_stats()
    (gradient,) = torch.autograd.grad(loss(), logits)
    return torch.cuda.max_memory_allocated() / 2**30, gradient
