"""The three tokens of a latent span, and where they stand in a finished response."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from future_l1_plugin.errors import CheckpointError

LATENT, START, END = "<|latent|>", "<|latent_start|>", "<|latent_end|>"
#: In the order in which the released checkpoints added them (ids 151669, 151670, 151671 on Qwen3-VL).
TOKENS = (LATENT, START, END)
#: The configuration keys that hold their ids, in the same order.
CONFIG_KEYS = ("latent_id", "latent_start_id", "latent_end_id")

_FIX = "Make a latent checkpoint with `future-l1 convert BASE OUT`."


@dataclass(frozen=True)
class LatentTokens:
    """Ids of `<|latent|>`, `<|latent_start|>` and `<|latent_end|>`."""

    latent: int
    start: int
    end: int

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> "LatentTokens":
        """Read the ids from a tokenizer. Raises CheckpointError if it lacks one of the tokens."""
        vocabulary = tokenizer.get_vocab()
        missing = [token for token in TOKENS if token not in vocabulary]
        if missing:
            raise CheckpointError(
                f"tokenizer {tokenizer.name_or_path!r}: expected the tokens {', '.join(TOKENS)}, "
                f"missing are {', '.join(missing)}. {_FIX}"
            )
        return cls(*(vocabulary[token] for token in TOKENS))

    @classmethod
    def from_config(cls, config: Any) -> "LatentTokens":
        """Read the ids from a model configuration. Raises CheckpointError if it lacks one of the keys."""
        missing = [key for key in CONFIG_KEYS if getattr(config, key, None) is None]
        if missing:
            name = getattr(config, "_name_or_path", "")
            raise CheckpointError(
                f"configuration {name!r}: expected the keys {', '.join(CONFIG_KEYS)}, "
                f"missing are {', '.join(missing)}. {_FIX}"
            )
        return cls(*(int(getattr(config, key)) for key in CONFIG_KEYS))

    @property
    def ids(self) -> tuple[int, int, int]:
        """In the order of `TOKENS`."""
        return self.latent, self.start, self.end


def latent_mask(response_ids: Tensor, tokens: LatentTokens) -> Tensor:
    """True at `<|latent|>` ids.

    Args:
        response_ids: Long (B, T), responses only: a prompt may spell the markers without meaning a span.

    Returns:
        Bool (B, T).
    """
    return response_ids == tokens.latent


def span_index(response_ids: Tensor, tokens: LatentTokens) -> Tensor:
    """The number of the span that each latent position belongs to.

    Spans count from 0 in each row, in order of their start markers; empty spans take a number, unclosed spans count.

    Args:
        response_ids: Long (..., T), responses only.

    Returns:
        Long (..., T): m at the `<|latent|>` positions of span m, -1 everywhere else (markers, text, padding, and
        `<|latent|>` ids outside any span).
    """
    position = torch.arange(1, response_ids.shape[-1] + 1, device=response_ids.device).expand_as(response_ids)
    start, end = response_ids == tokens.start, response_ids == tokens.end
    if response_ids.shape[-1] == 0:
        return position.clone()
    last_start = (position * start).cummax(-1).values
    last_end = (position * end).cummax(-1).values
    inside = (last_start > last_end) & latent_mask(response_ids, tokens)
    return torch.where(inside, start.cumsum(-1) - 1, -1)
