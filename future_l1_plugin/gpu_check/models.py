"""Random Qwen3-VLs for the self-test, made on the device: real and tiny shapes, no tokenizer, no processor, no hub.

A random model of real shape computes in the same precision, with the same kernels and in the same time as a trained
one. It lacks the outlier channels of trained ones, so what it says about bf16 is a lower bound for them.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor

from future_l1_plugin.model import tiny
from future_l1_plugin.model.backbone import QWEN3_VL, placeholder_ids
from future_l1_plugin.model.config import LatentConfig

#: Standard deviation of the logits: token probabilities are then about as uneven as those of a trained model.
LOGIT_STD = 3.0


@dataclass(frozen=True)
class Shape:
    """What differs between models. `ids` is the first of six: the latent ones, then the media ones."""

    text: dict[str, Any]
    vision: dict[str, Any]
    ids: int

    def config(self, layers: int | None = None) -> Any:
        """With the latent keys. layers: of the text decoder, in place of the shape's own."""
        text = self.text if layers is None else self.text | {"num_hidden_layers": layers}
        start, end, image, video = range(self.ids + 3, self.ids + 7)
        config = QWEN3_VL.new_config(text, self.vision, image=image, video=video, start=start, end=end, tied=False)
        # Two spans a response, of a fixed length: `OpenSpans` opens them.
        LatentConfig(self.ids, self.ids + 1, self.ids + 2).to_hf(config)
        return config


#: Qwen3-VL-8B.
FULL = Shape(
    text=dict(
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=262144,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        rope_parameters=dict(rope_type="default", rope_theta=5e6, mrope_section=[24, 20, 20], mrope_interleaved=True),
    ),
    vision=dict(
        depth=27,
        hidden_size=1152,
        intermediate_size=4304,
        num_heads=16,
        patch_size=16,
        spatial_merge_size=2,
        temporal_patch_size=2,
        out_hidden_size=4096,
        num_position_embeddings=2304,
        deepstack_visual_indexes=[8, 16, 24],
    ),
    ids=151669,
)
#: Wide enough for a mean over rounding errors, small enough for float32 beside bf16 with gradients.
MIDDLE = Shape(
    text=FULL.text
    | dict(vocab_size=32768, hidden_size=1024, intermediate_size=3072, num_hidden_layers=8, num_attention_heads=8),
    vision=FULL.vision | dict(depth=2, out_hidden_size=1024, deepstack_visual_indexes=[1]),
    ids=32000,
)
TINY = Shape(text=tiny.TEXT | dict(tie_word_embeddings=False), vision=tiny.VISION, ids=500)


class NoText:
    """Takes a tokenizer's place in `generate`, which decodes its responses."""

    eos_token_id = None
    pad_token_id = 0

    def batch_decode(self, rows: list[list[int]], **_: Any) -> list[str]:
        return ["" for _ in rows]


def build(
    shape: Shape, device: torch.device, dtype: torch.dtype, layers: int | None = None, seed: int = 0
) -> nn.Module:
    """A random model in eval mode, with the latent keys, whose responses have no end-of-sequence token."""
    before = torch.get_default_dtype()
    torch.manual_seed(seed)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = QWEN3_VL.model.load()(shape.config(layers))
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        # Hidden states behind the final norm have a root mean square of 1.
        model.lm_head.weight.normal_(0, LOGIT_STD / math.sqrt(model.lm_head.in_features))
    return ready(model)


def ready(model: nn.Module) -> nn.Module:
    """What `generate` wants of a model that came without a tokenizer."""
    model.generation_config = GenerationConfig(pad_token_id=NoText.pad_token_id)
    model.latent_tokenizer = NoText()
    return model.eval()


def layers_that_fit(device: torch.device, shape: Shape, spare_gib: float = 24.0) -> int:
    """Text layers, at most the shape's own, that leave `spare_gib` of the card's free memory, in bf16."""
    text = shape.text
    hidden, heads = text["hidden_size"], text["num_attention_heads"] + text["num_key_value_heads"]
    layer = 2 * (2 * hidden * heads * text["head_dim"] + 3 * hidden * text["intermediate_size"])  # bytes
    fixed = 2 * 2 * text["vocab_size"] * hidden + 2**30  # embeddings, vision tower
    free = torch.cuda.mem_get_info(device)[0] - spare_gib * 2**30 - fixed
    return max(2, min(text["num_hidden_layers"], int(free / layer)))


def prompts(model: nn.Module, batch: int, shortest: int, longest: int, seed: int = 0) -> dict[str, Tensor]:
    """`batch` random text prompts of `shortest` to `longest` tokens, left-padded, on the model's device."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, text_ids(model), (batch, longest), generator=draw)
    length = torch.randint(shortest, longest + 1, (batch,), generator=draw)
    mask = (torch.arange(longest) >= longest - length[:, None]).long()
    return {"input_ids": (ids * mask).to(model.device), "attention_mask": mask.to(model.device)}


def text_ids(model: nn.Module) -> int:
    """Ids from 1 to below this are neither latent nor media ones."""
    config = model.config
    return min(config.latent_id, *placeholder_ids(config), config.vision_start_token_id)


class OpenSpans(LogitsProcessor):
    """Has every row open a span at these steps of its response, as a random model hardly ever does."""

    def __init__(self, start_id: int, prompt: int, at: tuple[int, ...]) -> None:
        self._start, self._at = start_id, {prompt + step for step in at}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] not in self._at:
            return scores
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self._start] = 0.0
        return forced
