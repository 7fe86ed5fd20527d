"""Qwen3-VL-8B's real shape without its weights: configurations for tests on the meta device and for dry runs.

Values are those of config.json of Qwen/Qwen3-VL-8B-Instruct; 8,767,123,696 parameters, as the hub counts. Latent ids
are the first three behind the real tokenizer's 151,669 entries, inside the vocabulary of 151,936 rows.
"""

from copy import deepcopy
from pathlib import Path
from typing import Any

LATENT_ID, LATENT_START_ID, LATENT_END_ID = 151669, 151670, 151671


def qwen3_vl_8b(latent: bool = True, layers: int = 36, **latent_keys: Any) -> Any:
    """A Qwen3VLConfig of that shape.

    Args:
        latent: with the keys of a latent checkpoint, `LatentConfig`'s defaults and `latent_keys` over them.
        layers: of the text decoder; fewer, where a test needs weights.
    """
    from transformers import Qwen3VLConfig

    from future_l1_plugin.gpu_check.models import FULL
    from future_l1_plugin.model import LatentConfig

    text = deepcopy(FULL.text) | {"num_hidden_layers": layers, "bos_token_id": 151643, "eos_token_id": 151645}
    tokens = {
        "image_token_id": 151655,
        "video_token_id": 151656,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
    }
    config = Qwen3VLConfig(text_config=text, vision_config=dict(FULL.vision), tie_word_embeddings=False, **tokens)
    config.architectures = ["Qwen3VLForConditionalGeneration"]
    if latent:
        LatentConfig(LATENT_ID, LATENT_START_ID, LATENT_END_ID, **latent_keys).to_hf(config)
    return config


def write_config(folder: Path, **keys: Any) -> Path:
    """`config.json` of that shape in a new folder, without weights, tokenizer and processor; returns the folder.

    keys: of `qwen3_vl_8b`.
    """
    folder.mkdir(parents=True)
    qwen3_vl_8b(**keys).save_pretrained(folder)
    return folder
