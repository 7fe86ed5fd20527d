"""Something else in the latents' place, and what was recorded of them: the means of `future-l1 probe`. Pure torch.

An `Intervention` is a latent policy, so that decoding stays as it is. It is also `generate`'s `on_token`, which is how
it knows in which span each row is, and at which position of it:

    policy = Intervention(tokens, [zeroed, noised(0, "question 7"), replayed(spans)])     # one function a row
    generate(model, inputs, policy=policy, on_token=policy.see)
"""

import base64
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from future_l1_plugin.errors import DataError
from future_l1_plugin.journal import key_of
from future_l1_plugin.latent.policy_base import Policy
from future_l1_plugin.latent.tokens import END, LATENT, START, LatentTokens

#: (mu (H,), number of the span, position in it, both from 0) -> the latent to feed, (H,). Empty spans are not counted.
Replace = Callable[[Tensor, int, int], Tensor]


class Intervention(Policy):
    """Feeds what a function of each row makes of mu; for one call of `generate`, on B rows.

    Args:
        tokens: ids of the markers.
        rows: for each row what replaces its latents; None leaves the row alone.
    """

    name = "intervention"
    stochastic = False

    def __init__(self, tokens: LatentTokens, rows: Sequence[Replace | None]) -> None:
        self._tokens, self._rows = tokens, list(rows)
        self._inside = [False] * len(self._rows)  # whether the row has opened a span
        self._span = [0] * len(self._rows)  # number of its newest span; spans without latents do not count
        self._position = [0] * len(self._rows)  # of the latent that comes next, if one comes

    def sample(self, mu: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """mu (B, H) with what replaces it. A row whose span is over gets something, too, which decoding drops."""
        z = mu.clone()
        for i, replace in enumerate(self._rows):
            if replace is not None and self._inside[i]:
                z[i] = replace(mu[i], self._span[i], self._position[i])
        return z

    def see(self, ids: Tensor, latent: Tensor) -> None:
        """After each step: ids Long (B,), latent Bool (B,)."""
        for i, (token, is_latent) in enumerate(zip(ids.tolist(), latent.tolist(), strict=True)):
            if token == self._tokens.start:
                self._inside[i] = True
                self._span[i] += self._position[i] > 0
                self._position[i] = 0
            elif is_latent:
                self._position[i] += 1


def zeroed(mu: Tensor, span: int, position: int) -> Tensor:
    """Zeros."""
    return torch.zeros_like(mu)


def noised(*seed: Any) -> Replace:
    """Gaussian noise, scaled to the norm of mu. `seed`: JSON values; each span and position has noise of its own."""

    def replace(mu: Tensor, span: int, position: int) -> Tensor:
        generator = torch.Generator().manual_seed(int(key_of(*seed, span, position)[:15], 16))
        noise = torch.randn(mu.shape, generator=generator).to(mu.device)
        return (noise * (mu.float().norm() / noise.norm())).to(mu.dtype)

    return replace


def replayed(spans: Sequence[Tensor]) -> Replace:
    """Recorded latents, by span and position. `spans`: (k, H) each, k >= 1, at least one.

    Text goes its own way once latents have changed: a response may open more spans than were recorded, or longer ones.
    Both then begin again at the first, so that no latent of the model's own is ever fed.
    """

    def replace(mu: Tensor, span: int, position: int) -> Tensor:
        recorded = spans[span % len(spans)]
        return recorded[position % len(recorded)].to(mu)

    return replace


def derangement(n: int, seed: Any) -> list[int]:
    """A random permutation of 0..n-1 that moves every element (a single cycle, by Sattolo's algorithm); n >= 2."""
    rng, order = random.Random(key_of(seed)), list(range(n))
    for i in range(n - 1, 0, -1):
        j = rng.randrange(i)
        order[i], order[j] = order[j], order[i]
    return order


# ---- recordings -----------------------------------------------------------------------------------------------------


def packed(tensor: Tensor) -> dict[str, Any]:
    """A tensor as JSON, bit by bit."""
    data = tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "data": base64.b64encode(data).decode(),
    }


def unpacked(value: Mapping[str, Any]) -> Tensor:
    """The tensor that `packed` was given, on the CPU."""
    data = bytearray(base64.b64decode(value["data"]))
    dtype = getattr(torch, value["dtype"])
    return (torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)).reshape(value["shape"])


def recorded_spans(row: Mapping[str, Any]) -> list[Tensor]:
    """`split_spans` of a row of the response log."""
    return split_spans(row["text"], unpacked(row["latents"]))


def split_spans(text: str, latents: Tensor) -> list[Tensor]:
    """The latents (k, H) of a response by span; spans without latents are left out.

    Raises DataError: the text has other latents, as a stop string leaves it.
    """
    lengths = [part.split(END)[0].count(LATENT) for part in text.split(START)[1:]]
    if sum(lengths) != len(latents):
        raise DataError(
            f"expected {len(latents)} latents in the text, found {sum(lengths)}: run without stop strings (until=..) "
            f"and with another --out. The text: {text!r:.200}"
        )
    return [span for span in latents.split(lengths) if len(span)] if lengths else []
