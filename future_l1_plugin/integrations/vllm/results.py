"""The form in which latents leave the engine with a finished request: bytes, or base64 where they cross HTTP."""

import base64
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from future_l1_plugin.errors import ConfigError
from future_l1_plugin.latent.spans import spans_of
from future_l1_plugin.latent.tokens import LatentTokens

KEY = "latents"


@dataclass(frozen=True)
class Latents:
    """What a finished request brings, T tokens with k latents; as `LatentOutput` of `model.generate`, one row.

    latents: (k, H) in the model's dtype: what was fed at the `<|latent|>` positions, in order.
    forced: Bool (T,), True where the grammar chose the id. Their log-probability is 0.
    means: (k, H), the mu around which each latent was drawn; None unless latent_return is "means". So is
    end_logprobs: float32 (k,), log p(`<|latent_end|>`) where each latent was chosen.
    """

    latents: Tensor
    forced: Tensor
    means: Tensor | None = None
    end_logprobs: Tensor | None = None


def pack(latents: Latents, form: str) -> dict[str, Any]:
    """`kv_transfer_params` of a request; with the form "text" they are JSON values, with "bytes" msgpack's."""
    return {KEY: {name: _encode(tensor, form) for name, tensor in vars(latents).items() if tensor is not None}}


def unpack(params: dict[str, Any] | None) -> Latents:
    """The other way. Raises ConfigError if the request brought no latents back."""
    if not params or KEY not in params:
        raise ConfigError(
            "the output holds no latents. Expected a finished request with latent_return latents or means, n=1, from "
            "an engine started with future_l1_plugin.integrations.vllm.engine_args"
        )
    return Latents(**{name: _decode(value) for name, value in params[KEY].items()})


def forced_ids(response: list[int], tokens: LatentTokens, limit: int, force_start: bool) -> Tensor:
    """Bool (T,): ids that the grammar chose, told from the response alone.

    They are the latents, the end markers of spans that spent their budget `limit`, and with `force_start` the first id.
    """
    forced = torch.tensor(response, dtype=torch.long) == tokens.latent
    for start, held, closed in spans_of(response, tokens):
        if closed and held == limit:
            forced[start + held + 1] = True
    if force_start and response:
        forced[0] = True
    return forced


def _encode(tensor: Tensor, form: str) -> dict[str, Any]:
    data = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    return {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "data": base64.b64encode(data).decode("ascii") if form == "text" else data,
    }


def _decode(value: dict[str, Any]) -> Tensor:
    dtype, data = getattr(torch, value["dtype"]), value["data"]
    data = bytearray(base64.b64decode(data) if isinstance(data, str) else data)
    flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
    return flat.view(value["shape"])
