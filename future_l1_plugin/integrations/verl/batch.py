"""Latents in verl's batches: which positions they stand at, and which rows they belong to.

verl carries samples of different lengths as jagged nested tensors: `input_ids` (prompt and response), `responses`,
`response_mask`, and our `latents` (k_i, H). Functions here take such a batch and speak of its tokens laid end to end
("flat", n tokens in all).
"""

from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from future_l1_plugin.integrations.verl.columns import LATENTS, rows
from future_l1_plugin.integrations.verl.host import tu
from future_l1_plugin.latent import LatentTokens


def flat(field: Any) -> Tensor:
    """All rows end to end."""
    return field.values() if field.is_nested else field.flatten(0, 1)


def trained_latents(batch: TensorDict, tokens: LatentTokens) -> int:
    """Latent positions that count in the loss."""
    found = (flat(batch["responses"]) == tokens.latent) & flat(batch["response_mask"]).bool()
    return int(found.sum())


def latent_rows(batch: TensorDict, tokens: LatentTokens) -> list[Tensor]:
    """The recorded latents of each row, (k_i, H).

    Rows that verl adds to fill a batch copy the latents of a real sample beside an empty response; they get none.

    Raises:
        ValueError: a row's latents and `<|latent|>` ids differ in number.
    """
    expected = _row_sums(flat(batch["responses"]) == tokens.latent, batch["responses"])
    trained = _row_sums(flat(batch["response_mask"]), batch["response_mask"])
    given = rows(batch[LATENTS])
    given = [row if n or t else row[:0] for row, n, t in zip(given, expected, trained, strict=True)]
    for i, (row, n) in enumerate(zip(given, expected, strict=True)):
        if len(row) != n:
            name = list(batch["uid"])[i] if "uid" in batch else f"in row {i}"
            raise ValueError(
                f"sample {name}: its response has {n} <|latent|> ids, its rollout brought {len(row)} latents. Ids and "
                "latents must come from one rollout: if an agent loop of your own cuts or edits responses, cut "
                "`latents` with them."
            )
    return given


def _row_sums(values: Tensor, field: Any) -> list[int]:
    """The sum of each row of `values`, which lie as `flat(field)` does. One wait for the device."""
    if not field.is_nested:
        return values.view(len(field), -1).sum(1).tolist()
    sums = torch.nn.functional.pad(values.long().cumsum(0), (1, 0))
    return sums[field.offsets()].diff().tolist()


def response_positions(batch: TensorDict) -> Tensor:
    """Bool (n,), True at response tokens."""
    offsets = batch["input_ids"].offsets()
    lengths = offsets.diff()
    prompts = batch["prompts"]
    prompts = prompts.offsets().diff() if prompts.is_nested else torch.tensor([prompts.shape[1]] * len(prompts))
    position = torch.arange(int(offsets[-1]), device=offsets.device) - offsets[:-1].repeat_interleave(lengths)
    return position >= prompts.to(offsets).repeat_interleave(lengths)


def laid_out(where: Tensor, batch: TensorDict, shape: torch.Size) -> Tensor:
    """Flat Bool (n,) in the layout of the model's input: right-padded (B, T), or packed (1, n or more)."""
    if shape[0] == 1 and shape[1] >= len(where):
        return torch.nn.functional.pad(where, (0, shape[1] - len(where)))[None]
    nested = torch.nested.nested_tensor_from_jagged(where, batch["input_ids"].offsets())
    return torch.nested.to_padded_tensor(nested, padding=False, output_size=tuple(shape))


def with_ragged_positions(batch: TensorDict) -> TensorDict:
    """Fix M-RoPE positions, in place, where every sample of the batch has one length.

    Rows (4, T_i) that differ in T_i make a nested tensor that is ragged in T. If no two differ, what arrives is ragged
    in the 4 (or dense), while verl (`maybe_fix_3d_position_ids`) declares it to be ragged in T.
    """
    positions = batch.get("position_ids", None)
    if positions is None or positions.dim() != 3:
        return batch
    lengths = batch["input_ids"].offsets().diff()
    if not positions.is_nested or not torch.equal(positions.offsets().diff(), lengths):
        if positions.is_nested:
            positions._ragged_idx = 1
        batch["position_ids"] = tu.nested_tensor_from_tensor_list(rows(positions), ragged_idx=2)
    return batch
