"""Latent decoding on an unmodified Qwen3-VL.

transformers' own extension point carries it: `model.generate(custom_generate=loop)` prepares inputs, cache, M-RoPE
positions, logits processors and stopping criteria, then calls our loop in place of its own. Each step of the loop asks
the span grammar what follows; where a latent follows, a hook on the input embedding writes it into the next pass.
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from future_l1_plugin.errors import ConfigError
from future_l1_plugin.latent.channel import latent_head, text_backbone
from future_l1_plugin.latent.policy import build_policy
from future_l1_plugin.latent.spans import SpanBudget, SpanMachine
from future_l1_plugin.latent.tokens import LatentTokens
from future_l1_plugin.model.backbone import placeholder_ids
from future_l1_plugin.model.config import LatentConfig


@dataclass(frozen=True)
class LatentOutput:
    """What `generate` returns for B rows.

    sequences: Long (B, P + T), prompt and response, padded at the end as transformers does.
    responses: Long (T_i,) each, cut after the row's end-of-sequence token.
    latents: (k_i, H) each, in the model's dtype: what was fed at the row's `<|latent|>` positions.
    logprobs: Float (T_i,) each, natural log. Of the full softmax at the given temperature (1 for greedy), so that a
        teacher-forced pass reproduces them; top-p, top-k and the grammar's bans do not enter. Forced tokens have 0.
    forced: Bool (T_i,) each, True where the grammar, not the model, chose the id.
    text: the responses decoded, special tokens kept, end-of-sequence token left out.

    With `record_means` only, else None:
    means: (k_i, H) each, in the model's dtype: the mu around which each latent was drawn.
    end_logprobs: Float (k_i,) each, at most 0: log p(`<|latent_end|>`) where each latent was chosen, the model's own
        chance to end the span there, of the same softmax as `logprobs`. With full relative precision also where it is
        near 0, so that log(1 - p) = log(-expm1(x)) in float64 loses nothing.
    """

    sequences: Tensor
    responses: list[Tensor]
    latents: list[Tensor]
    logprobs: list[Tensor]
    forced: list[Tensor]
    text: list[str]
    means: list[Tensor] | None = None
    end_logprobs: list[Tensor] | None = None


class _Feedback:
    """Two hooks: keep the last hidden state of each pass, and write latents over the next pass's embeddings."""

    def __init__(self) -> None:
        self.hidden: Tensor | None = None  # (B, H), after the final norm
        self.rows: Tensor | None = None  # Bool (B, 1, 1): rows to overwrite
        self.latents: Tensor | None = None  # (B, 1, H)

    @contextmanager
    def on(self, model: nn.Module):
        text = text_backbone(model)
        handles = [
            text.norm.register_forward_hook(self._keep),
            text.embed_tokens.register_forward_hook(self._write),
        ]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _keep(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        self.hidden = output[:, -1]

    def _write(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        if self.rows is None:
            return None
        rows, self.rows = self.rows, None
        return torch.where(rows, self.latents, output)


def generate(
    model: nn.Module,
    inputs: Any,
    policy: Any = "deterministic",
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    generator: torch.Generator | None = None,
    tokenizer: Any = None,
    on_token: Callable[[Tensor, Tensor], None] | None = None,
    record_means: bool = False,
    budget: SpanBudget | None = None,
    **generate_kwargs: Any,
) -> LatentOutput:
    """Decode text and latent spans for a batch.

    Args:
        model: from `load`, or any Qwen3-VL whose config has the latent keys; PEFT-wrapped models too.
        inputs: what the processor returns, left-padded, on the model's device.
        policy: how latents are drawn around mu: a name or an object of `build_policy`.
        temperature: 0 = greedy.
        generator: randomness for tokens and latents, on the model's device.
        tokenizer: decodes the text; by default the one that `load` left on the model.
        on_token: called after each step with ids Long (B,) and latent Bool (B,), for streaming.
        record_means: also return `means` and `end_logprobs`, which the density of a rollout is computed from.
        budget: of every span, in place of the checkpoint's rule.
        generate_kwargs: further arguments of `model.generate` (e.g. `stopping_criteria`, `logits_processor`).

    Raises:
        CheckpointError: the model's config has no latent keys.
        ConfigError: negative temperature, right padding, no tokenizer.
    """
    config = LatentConfig.from_hf(model.config)
    tokenizer = tokenizer or getattr(model, "latent_tokenizer", None)
    if tokenizer is None:
        raise ConfigError(
            "generate: the model brings no tokenizer; load it with future_l1_plugin.model.load or pass one"
        )
    if temperature < 0:
        raise ConfigError(f"generate: expected temperature >= 0 (0 = greedy), found {temperature}")
    prompt = inputs["input_ids"]
    if "attention_mask" in inputs and not bool(inputs["attention_mask"][:, -1].all()):
        raise ConfigError("generate: expected left-padded prompts; set processor.tokenizer.padding_side = 'left'")
    policy = build_policy(policy) if isinstance(policy, str) else policy
    record = _Record(record_means)
    feedback = _Feedback()
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k}

    def loop(model: nn.Module, input_ids: Tensor, **kwargs: Any) -> Tensor:
        machine = SpanMachine(
            config.tokens,
            budget or config.budget,
            len(input_ids),
            input_ids.device,
            force_start=config.force_initial_latent_mode,
        )
        return _decode(model, input_ids, machine, feedback, policy, temperature, generator, record, on_token, **kwargs)

    with feedback.on(model):
        sequences = model.generate(
            **inputs,
            custom_generate=loop,
            max_new_tokens=max_new_tokens,
            # Checkpoints bring sampling defaults of their own; what is asked for here must not mix with them.
            repetition_penalty=1.0,
            **(sampling if temperature > 0 else {"do_sample": False}),
            **generate_kwargs,
        )
    return record.output(sequences, prompt.shape[1], len(prompt), tokenizer, config.tokens)


class _Record:
    """What the loop leaves behind, one entry a step."""

    def __init__(self, means: bool) -> None:
        self.logprobs: list[Tensor] = []
        self.forced: list[Tensor] = []
        self.alive: list[Tensor] = []
        self.latent_rows: list[Tensor] = []  # Bool (B,): rows with a latent; one entry a step that has any, as below
        self.latents: list[Tensor] = []  # (B, H)
        self.means: list[Tensor] | None = [] if means else None  # (B, H)
        self.end_logprobs: list[Tensor] = []  # (B,), only with means
        self.empty: Tensor | None = None  # (0, H), for rows without a latent

    def output(self, sequences: Tensor, prompt: int, batch: int, tokenizer: Any, tokens: LatentTokens) -> LatentOutput:
        lengths = torch.stack(self.alive).sum(0).tolist()
        ids, logprobs, forced = sequences[:, prompt:], torch.stack(self.logprobs, 1), torch.stack(self.forced, 1)
        picked: list[list[int]] = [[] for _ in range(batch)]  # for each row, the entries that are its latents
        for entry, rows in enumerate(self.latent_rows):
            for row in rows.nonzero().squeeze(1).tolist():
                picked[row].append(entry)

        def by_row(values: list[Tensor], none: Tensor) -> list[Tensor]:
            return [torch.stack([values[e][i] for e in row]) if row else none for i, row in enumerate(picked)]

        responses = [ids[i, :n] for i, n in enumerate(lengths)]
        special = {tokenizer.eos_token_id, tokenizer.pad_token_id}
        shown = [[t for t in row.tolist() if t not in special] for row in responses]
        return LatentOutput(
            sequences=sequences,
            responses=responses,
            latents=by_row(self.latents, self.empty),
            logprobs=[logprobs[i, :n] for i, n in enumerate(lengths)],
            forced=[forced[i, :n] for i, n in enumerate(lengths)],
            text=tokenizer.batch_decode(shown, skip_special_tokens=False),
            means=None if self.means is None else by_row(self.means, self.empty),
            end_logprobs=None if self.means is None else by_row(self.end_logprobs, logprobs.new_empty(0)),
        )


def _decode(
    model: nn.Module,
    input_ids: Tensor,
    machine: SpanMachine,
    feedback: _Feedback,
    policy: Any,
    temperature: float,
    generator: torch.Generator | None,
    record: _Record,
    on_token: Callable[[Tensor, Tensor], None] | None,
    *,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    synced_gpus: bool = False,
    **model_kwargs: Any,
) -> Tensor:
    """The decoding loop that `model.generate` calls; returns Long (B, P + T)."""
    head = latent_head(model)
    pad = generation_config._pad_token_tensor
    # M-RoPE breaks on media placeholders in a response: the model cannot emit them.
    media = torch.tensor(placeholder_ids(model.config), device=input_ids.device)
    alive = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
    first = True
    while bool(alive.any()):
        step_inputs = model.prepare_inputs_for_generation(
            input_ids,
            is_first_iteration=first,
            next_sequence_length=None if first else 1,
            **model_kwargs,
        )
        if first:
            step_inputs["logits_to_keep"] = 1
        outputs = model(**step_inputs, return_dict=True)
        first = False
        model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
        logits = outputs.logits[:, -1].float()  # (B, V)

        scores = machine.forbid(logits.index_fill(1, media, -torch.inf))
        scores = logits_processor(input_ids, scores)
        if temperature > 0:
            proposal = torch.multinomial(scores.softmax(-1), 1, generator=generator).squeeze(1)
            logits = logits / temperature
        else:
            proposal = scores.argmax(-1)
        step = machine.step(proposal)
        latent = step.latent & alive
        ids = torch.where(alive, step.ids, pad)

        chosen = logits.gather(1, ids[:, None]).squeeze(1) - logits.logsumexp(-1)
        record.logprobs.append(chosen.masked_fill(step.forced, 0.0))
        record.forced.append(step.forced)
        record.alive.append(alive)

        mu = feedback.hidden if head is None else head(feedback.hidden)
        if record.empty is None:
            record.empty = mu[:0]
        if bool(latent.any()):
            drawn = policy.sample(mu, generator)  # for all rows: cheaper than picking some out and putting them back
            record.latent_rows.append(latent)
            record.latents.append(drawn)
            if record.means is not None:
                record.means.append(mu)
                record.end_logprobs.append(log_softmax_at(logits, machine.tokens.end))
            feedback.rows = latent[:, None, None]
            feedback.latents = drawn[:, None]

        input_ids = torch.cat([input_ids, ids[:, None]], dim=1)
        if on_token is not None:
            on_token(ids, latent)
        alive = alive & ~stopping_criteria(input_ids, None)
    return input_ids


def log_softmax_at(logits: Tensor, token: int) -> Tensor:
    """log p(token) (B,) from logits (B, V), as precise near 0 as elsewhere: log(1 - p) can be had from it."""
    others = logits.clone()
    others[:, token] = -torch.inf  # by a number: an index tensor would have to be sent to the device at each step
    return torch.nn.functional.logsigmoid(logits[:, token] - others.logsumexp(-1))
