"""The latent SFT objective: cross-entropy on text plus lambda times the latent loss.

L = CE + lambda * latent_loss(mu, e*)                                   (Future-L1, arXiv 2606.05769, SFT objective)

e* is what the vision merger makes of a future frame, detached. mu is the hidden state one position before each latent,
through the head if there is one.

CE is the mean over the decisions that decoding takes. Text and markers are such decisions. In the paper they are all:
the positions before a latent carry no label, so nothing there holds p(`<|latent_end|>`) down, and where decoding leaves
the length of a span to the model, it ends spans at once. With `going_on`, CE holds those positions, too: at each latent
that decoding asks for (`SpanBudget.choices`), one position before the latent, `<|latent|>` is the label:

    -log p(latent) = -log(1 - p(end)) - log p(latent | not end)

The first part is the choice to go on, as decoding draws it and RL weighs it (`latent.going_on`). The second is for
greedy decoding, which ends a span where the end is the likeliest token: with the first alone, what is not the end lies
spread over the vocabulary, and an end of p = .04 is the likeliest (150 steps on the micro world: mean p(end) .01, yet 3
of 30 spans empty, at p(end) .04 to .08). Each choice counts as one position of text, as the end marker behind the last
latent does: a span of k latents is k decisions to go on and one to end. Under a fixed budget there are none to go on.

What stands at the latent positions, as input? In the paper e* (teacher forcing). Text behind a span then learns to read
the answer off a sharp e*, where decoding gives it mu: the best guess, and therefore blurred. `OwnLatents` closes that
gap: in a share of the rows the inputs are the model's own mu, as in decoding. It is scheduled sampling (Bengio et
al., arXiv 1506.03099) for latents, with parallel passes instead of one latent after the other (Mihaylova and Martins,
arXiv 1906.07651). Both losses stay as they are: mu is still drawn to e*, text learns to cope with what mu lacks.

Where each rank holds a part of each weight (ZeRO-3), a module's forward pass is a collective operation: ranks that call
modules in another order, or one of them once more, wait for each other for ever. So the order is one and the same for
every batch of a run: the vision tower for e* (unless the run has no spans), the passes of the own latents (if there are
any), the pass with gradients; in it, as in the first of the own passes, the vision tower runs once, behind the input
embedding. What a batch lacks, future frames or question frames, stands in it as a blank picture that changes no value.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from future_l1_plugin.latent.channel import LatentChannel, text_backbone
from future_l1_plugin.latent.going_on import overhear
from future_l1_plugin.latent.loss import latent_loss, pool_targets
from future_l1_plugin.latent.policy import build_policy
from future_l1_plugin.model.backbone import MEDIA_KEYS, core_of
from future_l1_plugin.model.config import LatentConfig

#: The label that transformers' loss passes over.
_IGNORED = -100

#: Keys of a batch that are not arguments of the model.
OURS = (
    "latent_pixel_values",
    "latent_grid_thw",
    "latent_frames",
    "blank_pixel_values",
    "blank_grid_thw",
    "response_start",
    "record_ids",
    "failed",
)


@dataclass(frozen=True)
class SftLosses:
    """Scalars. `total`, `ce` and `latent` carry gradients.

    ce: mean over `decisions` (Long, no gradient): tokens with a label and, with `going_on`, choices to go on.
    latents: the number of latent positions.
    going_on: mean of -log(1 - p(end)) over the `choices` to go on, without gradient; without any 0.
    """

    total: Tensor
    ce: Tensor
    latent: Tensor
    latents: int
    decisions: Tensor
    going_on: Tensor
    choices: int


@dataclass(frozen=True)
class OwnLatents:
    """Where the latent inputs come from. The default is the paper's: e* everywhere.

    share: share of the rows (0..1) that are fed the model's own latents; each row is drawn by itself.
    passes: passes without gradient, at least 1, that the own latents are found by; see `own_latents`.
    mean_cosine: draw each own latent from the vMF around mu with this mean cosine, as a rollout does; None = mu itself.
    """

    share: float = 0.0
    passes: int = 4
    mean_cosine: float | None = None


#: The paper's.
TEACHER_FORCING = OwnLatents()


@torch.no_grad()
def latent_targets(
    model: nn.Module,
    config: LatentConfig,
    batch: dict[str, Any],
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> list[Tensor]:
    """e* for each row: (k_i, H), the merger output of its future frames, pooled if the training budget is fixed.

    The vision tower is called by itself, outside of the forward pass in which a trainer switches autocast on:
    `autocast` makes that context, or e* would be computed in the weights' own dtype. It ends with this pass: autocast
    keeps the weights that it has cast, and those of a pass without gradients would cut the gradients of the next.
    """
    frames = batch["latent_frames"].tolist()
    if "latent_pixel_values" not in batch:  # a run without spans
        return [torch.empty(0) for _ in frames]
    pixels, grid = batch["latent_pixel_values"], batch["latent_grid_thw"]
    with autocast():
        features, _ = core_of(model).image_features(pixels, grid)
    if config.train_fixed_latent_budget:
        features = [pool_targets(feature, config.train_fixed_latent_budget) for feature in features]
    features = iter(features)
    rows = []
    for count in frames:
        row = [next(features) for _ in range(count)]
        rows.append(torch.cat(row) if row else torch.empty(0))
    return rows


@contextmanager
def _as_with_pictures(model: nn.Module, batch: dict[str, Any]) -> Iterator[None]:
    """A forward pass of a batch that shows no picture runs the vision tower nevertheless, where others run it.

    Its output goes into the embeddings times zero: under training of the vision tower its backward pass runs, too.
    """
    if "blank_pixel_values" not in batch:
        yield
        return
    core = core_of(model)

    def look(module: nn.Module, args: tuple[Tensor, ...], embeddings: Tensor) -> Tensor:
        merged, more = core.image_features(batch["blank_pixel_values"], batch["blank_grid_thw"])
        nothing = sum(0.0 * features.sum() for features in (*merged, *more))
        return embeddings + nothing.to(embeddings)

    handle = text_backbone(model).embed_tokens.register_forward_hook(look)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def own_latents(
    model: nn.Module,
    config: LatentConfig,
    batch: dict[str, Any],
    passes: int,
    mean_cosine: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Latents the model would produce for these rows, text teacher-forced: (sum k_i, H) in the hidden states' dtype.

    The first pass is fed zeros, each further one what the pass before it made. After n passes the first n latents of a
    row are those of decoding, the others near them (a Jacobi iteration); n = k_i is exact. No pass sees e*: starting
    from e* would be near, too, but tell each latent about the frame through those before it.

    The part before the first latent runs once and is kept as keys and values; each pass runs the columns of the latents
    only. Every call makes 1 + `passes` forward passes, also for a batch without latents, because ranks of a distributed
    run must make equally many.

    Args:
        batch: what `SftCollator` returns, on the model's device.
        passes, mean_cosine: see `OwnLatents`. The last draw is the one returned.
        generator: randomness of the draws, on the model's device.
    """
    ids, mask = batch["input_ids"], batch["attention_mask"]
    where = _latents(config, batch)
    columns = where.any(0).nonzero().flatten().tolist() or [ids.shape[1] - 1]
    begin, end = columns[0] - 1, columns[-1] + 1  # mu of the first latent is read one column before it
    policy = build_policy("vmf", mean_cosine=mean_cosine) if mean_cosine is not None else None
    media = {key: batch[key] for key in MEDIA_KEYS if key in batch}
    core = core_of(model)
    positions = core.positions(batch, mask)
    cache = DynamicCache()

    def run(columns: slice, **inputs: Any) -> None:
        model(
            input_ids=ids[:, columns],
            attention_mask=mask[:, : columns.stop],
            position_ids=positions[..., columns],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **inputs,
        )

    with _evaluating(model):
        with _as_with_pictures(model, batch):
            run(slice(0, begin), **media)
        fed = torch.zeros(int(where.sum()), core.width, device=ids.device)
        with LatentChannel(model, config.tokens) as channel:
            for _ in range(passes):
                cache.crop(begin)
                channel.feed([fed], where=where[:, begin:end])
                run(slice(begin, end))
                fed = channel.mu if policy is None else policy.sample(channel.mu, generator)
    return fed


def _latents(config: LatentConfig, batch: dict[str, Any]) -> Tensor:
    """Bool (B, T), True at the latents of the responses."""
    ids = batch["input_ids"]
    response = torch.arange(ids.shape[1], device=ids.device) >= batch["response_start"][:, None]
    return (ids == config.latent_id) & response


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode: no dropout, and no gradient checkpointing, under which transformers drops the cache."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _packed(model: nn.Module, inputs: dict[str, Any], *marks: Tensor) -> tuple[Any, ...]:
    """The rows of a pass one behind the other in one row without padding, as transformers' padding-free collator
    (`DataCollatorWithFlattening`) lays them; it knows no pictures, so it is done here, where their positions are known.

    A row keeps its own M-RoPE positions, counted from its own beginning. Before these stand its plain ones, 0..: by
    their jumps transformers tells rows apart, and lets none attend to another (sdpa, eager: by the mask;
    flash_attention_2: by its variable lengths). It does so only without attention mask and without cache. Pictures lie
    one behind the other in any batch. The first token of a row is a prompt's: none is predicted across a border.

    Args:
        inputs: of the model, (B, T), padded anywhere.
        marks: (B, T) each.

    Returns:
        (inputs (1, N), *marks (1, N)), N tokens in all.
    """
    mask = inputs["attention_mask"].bool()
    kept = {key: value for key, value in inputs.items() if key != "attention_mask"}
    places = core_of(model).positions(kept, mask.long())
    places = torch.cat([mask.cumsum(1)[None] - 1, places])  # (4, B, T)
    row = {key: kept[key][mask][None] for key in ("input_ids", "labels", "mm_token_type_ids")}
    kept |= row | {"position_ids": places[:, mask][:, None], "use_cache": False}
    return kept, *(mark[mask][None] for mark in marks)


def sft_losses(
    model: nn.Module,
    config: LatentConfig,
    batch: dict[str, Any],
    own: OwnLatents = TEACHER_FORCING,
    generator: torch.Generator | None = None,
    going_on: bool = False,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    packing: bool = False,
) -> SftLosses:
    """One forward pass with gradients. `batch` is what `SftCollator` returns, on the model's device.

    Args:
        own: what the latent inputs are; by default e*.
        generator: randomness of `own`, on the model's device.
        going_on: train the choice to go on as well; see above. False = the paper's.
        autocast: the context in which `model` itself computes; see `latent_targets`.
        packing: make that pass without padding; see `_packed`. Changes no value beyond rounding.
    """
    targets = latent_targets(model, config, batch, autocast)
    fed = targets
    if own.share:
        drawn = torch.rand(len(targets), device=batch["input_ids"].device, generator=generator) < own.share
        mine = own_latents(model, config, batch, own.passes, own.mean_cosine, generator)
        mine = mine.split([len(row) for row in targets])
        fed = [a if is_own else b for a, b, is_own in zip(mine, targets, drawn.tolist(), strict=True)]
    inputs = {key: value for key, value in batch.items() if key not in OURS}
    where = _latents(config, batch)
    choices = config.budget.choices(where) if going_on else torch.zeros_like(where)
    inputs["labels"] = batch["labels"].masked_fill(choices, config.latent_id)
    decisions = (inputs["labels"][:, 1:] != _IGNORED).sum()
    if packing:
        inputs, where, choices = _packed(model, inputs, where, choices)
    with (
        LatentChannel(model, config.tokens) as channel,
        _as_with_pictures(model, batch),
        overhear(model, choices, config.latent_end_id) as went_on,
    ):
        channel.feed(fed, **({"where": where} if packing else {"response_start": batch["response_start"]}))
        ce = model(**inputs).loss
    kept_going = -went_on[0].detach() if went_on else ce.new_zeros(0)
    kept = [row for row in targets if len(row)]
    target = torch.cat(kept) if kept else channel.mu.detach()
    latent = latent_loss(channel.mu, target, config.latent_loss)
    total = ce + config.latent_lambda * latent
    asked = len(kept_going)
    return SftLosses(total, ce, latent, len(target), decisions, kept_going.sum() / max(1, asked), asked)
