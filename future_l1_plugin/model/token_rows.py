"""The embedding rows of the three latent tokens: apart from each other at the start, and trained under LoRA."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from future_l1_plugin.latent.tokens import LatentTokens

#: Rows are alike if two of them are nearer than this share of what two rows of the matrix usually are. What
#: `resize_token_embeddings` draws is at 1e-5, untrained spare rows at or near 0, the micro base's at 0.54.
ALIKE = 0.1
#: The modules that hold the rows.
INPUT, OUTPUT = "embed_tokens", "lm_head"


def is_tied(model: nn.Module) -> bool:
    """Whether input embedding and lm_head are one weight."""
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def trainable_rows(config: Any, without: Sequence[str] = ()) -> dict[str, list[int]] | None:
    """PEFT's `trainable_token_indices` for a latent checkpoint: under LoRA these rows learn, and no other row.

    Args:
        config: transformers' of the checkpoint. Where its embeddings are tied, PEFT lets lm_head follow.
        without: modules that have adapters of their own, which reach every row.

    Returns None if nothing is left.
    """
    tokens = LatentTokens.from_config(config)
    names = (INPUT,) if config.tie_word_embeddings else (INPUT, OUTPUT)
    rows = {name: list(tokens.ids) for name in names if name not in without}
    return rows or None


def parted_state(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A state dict of PEFT's under the names of the model itself, and the rows trained, under the names of what they
    are rows of. Names of LoRA's layers stay."""
    whole, rows = {}, {}
    for name, value in state.items():
        module, inner, rest = name.partition(".token_adapter.")
        is_row = rest.startswith("trainable_tokens_delta.")
        (rows if is_row else whole)[f"{module}.weight" if inner else name] = value
    return whole, rows


def part_rows(model: nn.Module, tokens: LatentTokens, used: int, seed: int) -> list[str]:
    """Where the three rows are alike, draw each anew as one more row of its matrix; in place.

    Rows that are alike get like inputs and like gradients: under LoRA, or in a short run, they stay one token. A new
    row has the mean and, in each dimension, the spread of the rows in use, and so their norm.

    Args:
        used: rows from this one on belong to no token.

    Returns the names of the matrices that were changed, of "embed_tokens" and "lm_head".
    """
    weights = {INPUT: model.get_input_embeddings().weight}
    if not is_tied(model):
        weights[OUTPUT] = model.get_output_embeddings().weight
    ids = torch.tensor(tokens.ids)
    others = torch.ones(used, dtype=torch.bool)
    others[ids] = False
    changed = []
    for i, (name, weight) in enumerate(weights.items()):
        known = weight.detach()[:used][others].float()
        if _apart(weight.detach()[ids].float(), known) >= ALIKE:
            continue
        noise = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(2 * seed + i))
        with torch.no_grad():
            weight[ids] = (known.mean(0) + known.std(0) * noise).to(weight.dtype)
        changed.append(name)
    return changed


def _apart(rows: Tensor, known: Tensor) -> float:
    """The smallest distance between two of `rows`, over the root mean square distance between two of `known`."""
    usual = (2 * known.var(0).sum()).sqrt()
    return float(torch.pdist(rows).min() / usual)
