"""A tiny random Qwen3-VL with a full processor, made offline in a second: for tests and for the embedded default."""

import json
import shutil
from pathlib import Path

import torch

from future_l1_plugin.errors import CheckpointError
from future_l1_plugin.model.backbone import QWEN3_VL
from future_l1_plugin.model.folders import check_new
from future_l1_plugin.model.template import chat_template

#: The real tokenizer's special tokens, in its order; the second group is not "special" to it.
SPECIAL = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
    "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
).split()
PLAIN = (
    "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|> "
    "<tool_response> </tool_response> <think> </think>"
).split()
#: The pre-trained micro base that ships with the package (made by scripts/make_micro_base.sh).
MICRO_BASE = Path(__file__).parent / "micro_base"
VOCABULARY = 512  # rows of the embedding: 256 bytes, merges, special tokens, room for the latent ones

#: Sizes of the text decoder and of the vision tower.
TEXT = dict(
    vocab_size=VOCABULARY,
    hidden_size=128,
    initializer_range=0.06,  # 0.02 is for widths of a thousand and more; here it slows learning down
    intermediate_size=384,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=32768,
    tie_word_embeddings=True,
    rope_parameters=dict(rope_type="default", rope_theta=1e3, mrope_section=[6, 5, 5], mrope_interleaved=True),
)
VISION = dict(
    depth=3,
    hidden_size=128,
    initializer_range=0.06,
    intermediate_size=256,
    num_heads=4,
    patch_size=16,
    spatial_merge_size=2,
    temporal_patch_size=2,
    out_hidden_size=128,
    num_position_embeddings=64,
    deepstack_visual_indexes=[1],
)

#: What the byte-pair merges are learned from: the words of the micro world, so that its texts stay short.
_CELLS = " ".join(column + row for column in "abcd" for row in "wxyz")
_CORPUS = [
    "system\n",
    "user\n",
    "assistant\n",
    "<0.5 seconds>",
    f"<reason>the red circle, the green square, the blue triangle, the yellow {_CELLS} hidden",
    "<reason>then it is at</reason>\n<reason>it is at</reason>\n</reason><answer>\n</answer>",
    f"Where will the red circle be 1 step later? {_CELLS}\n",
    f"Where will the green square be 3 steps later? {_CELLS}\n",
    "The middle of the video is cut out. Where was the blue triangle 2 steps after the cut?",
    "Where is the yellow square?",
    "\nPut only the option letter within <answer></answer>.",
    "frame_1\n",
    "Answer with the option's letter from the given choices directly.",
]


def _tokenizer():
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    from transformers import AddedToken, Qwen2Tokenizer
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 64, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator(_CORPUS * 50, trainer)
    learned = json.loads(bpe.to_str())["model"]
    merges = [tuple(merge) for merge in learned["merges"]]
    tokenizer = Qwen2Tokenizer(vocab=learned["vocab"], merges=merges, unk_token=None, model_max_length=32768)
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL], special_tokens=True)
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in PLAIN])
    tokenizer.eos_token = "<|im_end|>"  # set afterwards: passing it to the constructor shifts the ids
    return tokenizer


def make_tiny(out_path: str | Path, seed: int = 0, latent: bool = True, system_prompt: str = "") -> Path:
    """Write a random Qwen3-VL of about 2 million parameters (float32) with tokenizer and processors.

    Hidden size 128, 4 text and 3 vision layers, patches of 16 pixels merged 2x2, so a 64x64 frame is 4 tokens. The
    tokenizer is byte-level with merges for the words of the micro world.

    Args:
        latent: convert it at once into a latent checkpoint; False writes the plain base.
        system_prompt: for the chat template; "" = none, which keeps sequences short.
    """
    from transformers import GenerationConfig

    from future_l1_plugin.model.checkpoint import save
    from future_l1_plugin.model.config import LatentConfig

    check_new(out_path)
    tokenizer = _tokenizer()
    if latent:
        from future_l1_plugin.latent.tokens import TOKENS

        tokenizer.add_tokens(list(TOKENS), special_tokens=True)
    ids = tokenizer.get_vocab()
    template = chat_template(system_prompt)
    tokenizer.chat_template = template
    processor = QWEN3_VL.processor.load()(
        image_processor=QWEN3_VL.image_processor.load()(
            patch_size=16,
            temporal_patch_size=2,
            merge_size=2,
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
            size={"shortest_edge": 32 * 32, "longest_edge": 256 * 256},
        ),
        tokenizer=tokenizer,
        video_processor=QWEN3_VL.video_processor.load()(
            size={"shortest_edge": 2 * 32 * 32, "longest_edge": 32 * 256 * 256}
        ),
        chat_template=template,
    )
    config = QWEN3_VL.new_config(
        text=TEXT
        | dict(pad_token_id=ids["<|endoftext|>"], eos_token_id=ids["<|im_end|>"], bos_token_id=ids["<|endoftext|>"]),
        vision=VISION,
        image=ids[QWEN3_VL.image_token],
        video=ids[QWEN3_VL.video_token],
        start=ids[QWEN3_VL.start_token],
        end=ids[QWEN3_VL.end_token],
        tied=True,
    )
    if latent:
        LatentConfig(ids["<|latent|>"], ids["<|latent_start|>"], ids["<|latent_end|>"]).to_hf(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = QWEN3_VL.model.load()(config)
    model.generation_config = GenerationConfig(
        eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]], pad_token_id=ids["<|endoftext|>"]
    )
    save(model, processor, out_path)
    return Path(out_path)


def copy_micro_base(out_path: str | Path) -> Path:
    """Copy the shipped micro base (pre-trained on what is seen in the micro world, latent tokens added) to a folder.

    Raises CheckpointError if the folder holds files, or if the package lacks the weights.
    """
    out = Path(out_path)
    if not (MICRO_BASE / "config.json").exists():
        raise CheckpointError(f"{MICRO_BASE}: the micro base is missing. Make it with scripts/make_micro_base.sh.")
    check_new(out)
    shutil.copytree(MICRO_BASE, out, dirs_exist_ok=True)
    return out
