"""The grammar of latent spans, for a whole batch at once.

`<|latent_start|> <|latent|>*k <|latent_end|>`: after the start marker each next token id is forced to `<|latent|>` and
the model's own hidden state is its input, until the model's own next token is `<|latent_end|>` (k = 0 is allowed) or
the budget is spent, when `<|latent_end|>` is forced. Whatever else the model proposes inside a span, EOS included, is
overruled. Outside a span `<|latent|>` and `<|latent_end|>` are impossible.

The machine knows neither model nor tokenizer: hosts pass in proposed ids and apply the step it returns.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from future_l1_plugin.errors import ConfigError
from future_l1_plugin.latent.tokens import LatentTokens


@dataclass(frozen=True)
class SpanBudget:
    """How many latents per span may hold.

    limit: latents after which the end marker is forced, >= 0.
    exact: the model cannot end a span before (the fixed budget).
    """

    limit: int
    exact: bool = False

    def __post_init__(self) -> None:
        if self.limit < 0:
            raise ConfigError(f"span budget: expected a limit >= 0, found {self.limit}")

    @classmethod
    def from_config(cls, config: Any) -> "SpanBudget":
        """The budget rule of a checkpoint's configuration.

        `fixed_latent_budget` -> exactly `max_latent_token`; else `loose_latent_budget` if set (released code takes 0
        for "not set"); else round(`max_latent_token` * `infer_latent_multiplier`), at least 1.
        """
        most = int(config.max_latent_token)
        if getattr(config, "fixed_latent_budget", False):
            return cls(most, exact=True)
        loose = getattr(config, "loose_latent_budget", None)
        if loose:
            return cls(int(loose))
        return cls(max(1, round(most * float(getattr(config, "infer_latent_multiplier", 2.0)))))

    def choices(self, latent: Tensor) -> Tensor:
        """The latents before which decoding leaves it to the model whether the span goes on.

        They are the first `limit` of each span, behind which the end marker is forced; none under the fixed budget.

        Args:
            latent: Bool (B, T), True at the latents of whole spans, between whose ends other positions lie.

        Returns:
            Bool (B, T).
        """
        if self.exact:
            return torch.zeros_like(latent)
        position = torch.arange(1, latent.shape[1] + 1, device=latent.device).expand_as(latent)
        number = position - (position * ~latent).cummax(1).values  # 1, 2, .. within a span
        return latent & (number <= self.limit)


class SpanStep(NamedTuple):
    """What follows from one round of proposals; all of shape (B,)."""

    ids: Tensor  # Long: the token ids to append
    latent: Tensor  # Bool: rows whose next input is a latent, not an embedding
    forced: Tensor  # Bool: rows whose id was dictated by the grammar, not chosen by the model


class SpanMachine:
    """The state of the grammar for B rows, on any device, without a host sync.

    Each decoding step: mask the logits with `forbid`, choose a proposal a row, call `step`, append its ids, feed a
    latent where it says so.
    """

    def __init__(
        self,
        tokens: LatentTokens,
        budget: SpanBudget,
        batch_size: int,
        device: torch.device | str = "cpu",
        force_start: bool = False,
    ) -> None:
        """force_start: the first token of each row is `<|latent_start|>` (checkpoints of the latent-first kind)."""
        self.tokens, self.budget = tokens, budget
        self.inside = torch.zeros(batch_size, dtype=torch.bool, device=device)
        self.length = torch.zeros(batch_size, dtype=torch.long, device=device)
        self._outside_only = torch.tensor([tokens.latent, tokens.end], device=device)
        self._force_start = force_start

    def forbid(self, logits: Tensor) -> Tensor:
        """Set the logits (B, V) of `<|latent|>` and `<|latent_end|>` to -inf, in place, in rows outside a span."""
        kept = logits[:, self._outside_only].masked_fill(~self.inside[:, None], -torch.inf)
        return logits.index_copy_(1, self._outside_only, kept)

    def step(self, proposal: Tensor) -> SpanStep:
        """Advance every row by one token.

        Args:
            proposal: Long (B,), the model's own choice in each row.
        """
        tokens = self.tokens
        if self._force_start:
            self._force_start = False
            self.inside = torch.ones_like(self.inside)
            return SpanStep(
                torch.full_like(proposal, tokens.start), torch.zeros_like(self.inside), torch.ones_like(self.inside)
            )
        # Few, small operations: this runs once a token, beside a forward pass that may take a few milliseconds only.
        spent = self.inside & (self.length >= self.budget.limit)
        over = spent if self.budget.exact else spent | (proposal == tokens.end)
        latent = self.inside & ~over
        ids = proposal.masked_fill(latent, tokens.latent).masked_fill_(spent, tokens.end)
        self.inside = latent | ((proposal == tokens.start) & ~self.inside)
        self.length = (self.length + 1) * latent
        return SpanStep(ids, latent, latent | spent)


def spans_of(response_ids: list[int], tokens: LatentTokens) -> list[tuple[int, int, bool]]:
    """The spans of one finished response as (position of the start marker, latents held, closed).

    Raises ValueError where the ids break the grammar: a latent or end marker outside a span, or anything but latents
    between start and end.
    """
    spans: list[tuple[int, int, bool]] = []
    inside = False
    for position, token in enumerate(response_ids):
        if inside:
            start, length, _ = spans[-1]
            if token == tokens.latent:
                spans[-1] = (start, length + 1, False)
            elif token == tokens.end:
                spans[-1] = (start, length, True)
                inside = False
            else:
                raise ValueError(
                    f"position {position}: expected a latent or its end marker in a span, found id {token}"
                )
        elif token == tokens.start:
            spans.append((position, 0, False))
            inside = True
        elif token in (tokens.latent, tokens.end):
            raise ValueError(f"position {position}: id {token} outside of a latent span")
    return spans
