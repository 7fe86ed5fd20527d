"""The real tokenizer: ids, conversion, template, labels, spans and answers, where texts are not the micro world's."""

import unicodedata

import numpy as np
import pytest
import torch
from real_tokenizer import EMBEDDINGS, ranks, real_tokenizer, write_base

from future_l1_plugin.data.frames import VideoFrames
from future_l1_plugin.data.records import Frame, Text, TwiffRecord
from future_l1_plugin.data.sft import IGNORED, SftCollator, SftSample
from future_l1_plugin.latent import LatentTokens, latent_mask, span_index
from future_l1_plugin.latent.tokens import END, LATENT, START, TOKENS
from future_l1_plugin.model import LatentConfig, convert, load
from future_l1_plugin.model.template import SYSTEM_PROMPT
from future_l1_plugin.rewards import extract_answer, format_reward
from future_l1_plugin.rewards.answer import option_letter

#: Several scripts, digits, code, composed and decomposed letters, an emoji of several code points, white space.
TEXTS = (
    "Where will the ball be at 12:34:56, after 3.14159 s?",
    "红色的球会滚到哪里?它在第2帧向左移动了。",
    "Ёлка упадёт на землю через 5 секунд — 50 %",
    "カメラは右へ。데이터 ١٢٣ שלום",
    "e\u0301 é 👩‍👩‍👧 🏳️‍🌈 \u200b|",
    "\tdef f(x):\n        return x ** 2   # tail  \n\n",
)


@pytest.fixture(scope="module")
def tokenizer():
    found = real_tokenizer()
    found.add_tokens(list(TOKENS), special_tokens=True)
    return found


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    return convert(write_base(folder / "base"), folder / "latent")


@pytest.fixture(scope="module")
def loaded(converted):
    return load(converted, dtype=torch.float32)


def test_ids_are_the_released_ones(tokenizer):
    base = real_tokenizer()
    assert len(base) == 151669
    known = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645, "<|vision_start|>": 151652}
    known |= {"<|image_pad|>": 151655, "<|video_pad|>": 151656, "<think>": 151667, "</think>": 151668}
    assert {token: base.convert_tokens_to_ids(token) for token in known} == known
    assert LatentTokens.from_tokenizer(tokenizer) == LatentTokens(151669, 151670, 151671)
    # Of Qwen's own documentation and of tiktoken's ranks: ids of whole words.
    assert base("Hello world")["input_ids"] == [9707, 1879]


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_are_those_of_tiktoken_and_give_the_text_back(tokenizer, text):
    import tiktoken

    # Qwen's pattern, as its tokenizer for tiktoken has it.
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    qwen = tiktoken.Encoding("qwen", pat_str=pattern, mergeable_ranks=ranks(), special_tokens={})
    composed = unicodedata.normalize("NFC", text)  # Qwen2's own normaliser
    ids = tokenizer(text)["input_ids"]
    assert ids == qwen.encode(composed)
    assert tokenizer.decode(ids) == composed


def test_conversion_needs_no_more_embeddings(loaded, converted):
    model, processor = loaded
    assert model.get_input_embeddings().weight.shape[0] == model.lm_head.weight.shape[0] == EMBEDDINGS
    assert not model.config.tie_word_embeddings
    assert model.get_input_embeddings().weight.data_ptr() != model.lm_head.weight.data_ptr()
    config = LatentConfig.from_hf(model.config)
    assert config.tokens == LatentTokens.from_tokenizer(processor.tokenizer) == LatentTokens(151669, 151670, 151671)
    assert len(processor.tokenizer) == 151672 < EMBEDDINGS


def test_the_base_s_weights_are_untouched(loaded, converted):
    from safetensors.torch import load_file

    base = load_file(converted.parent / "base" / "model.safetensors")
    ours = load_file(converted / "model.safetensors")
    assert base.keys() == ours.keys() and all(torch.equal(base[name], ours[name]) for name in base)


def test_the_template_spells_what_the_tokenizer_reads(loaded):
    _, processor = loaded
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "球?"}]}]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = processor.tokenizer(text)["input_ids"]
    start, end = 151644, 151645
    assert ids[:3] == [start, 8948, 198], "<|im_start|>system\\n"
    assert ids[-3:] == [start, 77091, 198], "<|im_start|>assistant\\n"
    assert ids.count(end) == 2 and ids.count(151655) == 1
    assert processor.tokenizer.decode(ids) == text
    spelt = SYSTEM_PROMPT.count(START)
    assert spelt and ids.count(151670) == spelt, "the prompt spells markers, which become their ids"


def record(**changes):
    fields = dict(
        id="r1",
        video="clip.mp4",
        question="第1帧\n<image>\nWhere will 球 be in 2.5 s? It was said <answer>A</answer>.\nA. 左 ←\nB. droite",
        image=[1],
        reasoning=(
            Text("球 moves 12 cm, naïvely → right"),
            Frame(4),
            Text("🏀 then"),
            Frame(5),
            Text("it's «droite»"),
        ),
        answer="B",
    )
    return TwiffRecord(**(fields | changes))


def frames(count):
    pixels = np.random.default_rng(count).integers(0, 255, (count, 256, 256, 3), dtype=np.uint8)
    return VideoFrames(pixels, list(range(count)), 2.0, 10, "clip.mp4", "pyav")


def test_labels_and_spans_of_the_collator(loaded):
    model, processor = loaded
    tokens = LatentConfig.from_hf(model.config)
    batch = SftCollator(processor, tokens)([SftSample(record(), frames(1), frames(2))])
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    assert ids[batch["response_start"][0] - 3 : batch["response_start"][0]].tolist() == [151644, 77091, 198]
    response = ids[batch["response_start"][0] :]
    text = processor.tokenizer.decode(response)
    span = START + LATENT * 4 + END
    said = ("球 moves 12 cm, naïvely → right", "🏀 then", "it's «droite»")
    thoughts = [f"<reason>{thought}</reason>" for thought in said]
    assert text == span.join(thoughts) + "<answer>B</answer><|im_end|>\n"
    learned = ids[labels != IGNORED]
    assert torch.equal(labels[labels != IGNORED], learned)
    assert 151669 not in learned.tolist(), "no cross-entropy on latents"
    assert (labels[: batch["response_start"][0]] == IGNORED).all(), "nor on a prompt that spells markers"
    index = span_index(response[None], tokens.tokens)[0]
    assert index[index >= 0].tolist() == [0] * 4 + [1] * 4
    assert int(latent_mask(response[None], tokens.tokens).sum()) == 8
    # What was decoded is what rewards read.
    assert format_reward(text) == 1.0 and extract_answer(text) == "B"


@pytest.mark.parametrize(
    ("answer", "options", "letter"),
    [
        ("向左移动", {"A": "向右移动", "B": "向左移动"}, "B"),
        ("(C)", {"A": "x", "C": "y"}, "C"),
        ("The answer is B.", None, "B"),
        ("Ёлка упадёт", {"A": "Ёлка упадёт", "B": "Ёлка стоит"}, "A"),
    ],
)
def test_answers_survive_the_tokens(tokenizer, answer, options, letter):
    text = f"<reason>它会动</reason>{START}{LATENT * 3}{END}<reason>so</reason><answer>{answer}</answer><|im_end|>"
    ids = tokenizer(text)["input_ids"]
    assert ids.count(151669) == 3
    read = tokenizer.decode(ids, skip_special_tokens=False)
    assert read == text
    assert extract_answer(read) == answer and option_letter(read, options) == letter
    assert format_reward(read) == 1.0
