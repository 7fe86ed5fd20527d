"""Single prompts into a batch."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from future_l1_plugin.model.backbone import TOKEN_KEYS


def left_padded(
    samples: list[dict[str, Tensor]], pad_token_id: int, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """A batch of what the processor returns for single prompts: tokens left-padded, media rows joined.

    Args:
        samples: for each prompt `input_ids`, `attention_mask` and `mm_token_type_ids` (1, T_i), and the tensors of its
            images and videos if it has any.

    Returns:
        Token rows of shape (B, T) with T the longest prompt; media rows in the order of the prompts.
    """
    longest = max(sample["input_ids"].shape[1] for sample in samples)
    batch = {}
    for name in dict.fromkeys(name for sample in samples for name in sample):
        values = [sample[name] for sample in samples if name in sample]
        if name in TOKEN_KEYS:
            fill = pad_token_id if name == "input_ids" else 0
            values = [pad(value, (longest - value.shape[1], 0), value=fill) for value in values]
        batch[name] = torch.cat(values).to(device)
    return batch
