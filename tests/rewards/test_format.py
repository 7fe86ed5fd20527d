"""The format reward: one table of responses and the modes that accept them."""

import time

import pytest

from future_l1_plugin.errors import RewardError
from future_l1_plugin.latent import tokens
from future_l1_plugin.rewards import format as module
from future_l1_plugin.rewards import format_reward

L = "<|latent_start|><|latent|><|latent|><|latent_end|>"
R = "<reason>the ball falls</reason>"
A = "<answer>B</answer>"

ANY, FIRST, TEXT = {"any"}, {"any", "reason_first"}, {"text"}

RESPONSES = [
    # latent first
    (L + R + A, ANY),
    (L + R + L + R + A, ANY),
    # reason first
    (R + L + R + A, FIRST),
    (R + L + R + L + R + L + R + A, FIRST),
    # text only
    (R + A, TEXT),
    (R + R + A, TEXT),
    # white space and ends
    (f"\n{R}\n\n{L} {R}\t{A}\n", FIRST),
    (f"{R}{L}{R}{A}<|im_end|>", FIRST),
    (f"{R}{L}{R}{A}<|im_end|>\n<|endoftext|><|endoftext|>", FIRST),
    (f"{R}<|latent_start|> <|latent|> <|latent|> <|latent_end|>{R}{A}", FIRST),
    # spans of any length
    (f"{R}<|latent_start|><|latent_end|>{R}{A}", FIRST),
    (f"{R}<|latent_start|>{'<|latent|>' * 500}<|latent_end|>{R}{A}", FIRST),
    # signs of all kinds in the text
    (f"<reason>1 < 2 > 0, <b>bold</b>, a|b\n<|</reason>{L}{R}<answer>x<y</answer>", FIRST),
    (f"<reason>reason answer latent</reason>{L}<reason>é 球</reason>{A}", FIRST),
    # parts missing
    ("", set()),
    ("B", set()),
    (A, set()),
    (R, set()),
    (L, set()),
    (L + A, set()),
    (L + R, set()),
    (R + L + A, set()),
    (R + L + R, set()),
    # parts in other orders
    (R + R + L + R + A, set()),
    (R + L + R + R + A, set()),
    (R + L + L + R + A, set()),
    (L + L + R + A, set()),
    (A + L + R, set()),
    (L + R + A + R, set()),
    (L + R + A + L, set()),
    (L + R + A + A, set()),
    # empty parts
    (f"<reason></reason>{L}{R}{A}", set()),
    (f"<reason> \n</reason>{L}{R}{A}", set()),
    (f"{L}{R}<answer></answer>", set()),
    (f"{L}{R}<answer> </answer>", set()),
    # text outside
    (f"so {R}{L}{R}{A}", set()),
    (f"{R}so{L}{R}{A}", set()),
    (f"{R}{L}{R}so{A}", set()),
    (f"{R}{L}{R}{A}.", set()),
    (f"{R}{L}{R}{A}<|im_end|>more", set()),
    # unclosed, unopened, nested
    (f"{R}<|latent_start|><|latent|>", set()),
    (f"{R}<|latent_start|><|latent|>{R}{A}", set()),
    (f"{R}<|latent|><|latent_end|>{R}{A}", set()),
    (f"{R}<|latent_start|>{L}<|latent_end|>{R}{A}", set()),
    (f"{R}<|latent_start|>x<|latent_end|>{R}{A}", set()),
    (f"<reason>a<reason>b</reason></reason>{L}{R}{A}", set()),
    (f"<reason>a{L}b</reason>{R}{A}", set()),
    (f"{L}<reason>a</reason></reason>{A}", set()),
    (f"{L}<reason>a{A}</reason>", set()),
    (f"{L}<reason>a{A}", set()),
    (f"{L}{R}<answer>B", set()),
    (f"{L}{R}B</answer>", set()),
    (f"{L}{R}<answer><answer>B</answer></answer>", set()),
    (f"{L}{R}<answer>{L}B</answer>", set()),
    (f"{L}{R}<answer><reason>B</reason></answer>", set()),
    # other spellings and other special tokens
    (f"{L}<Reason>a</Reason>{A}", set()),
    (f"{L}{R}<answer >B</answer>", set()),
    (f"{L}{R}<answer>A <Answer>B</Answer></answer>", set()),
    (f"{L}{R}<answer>A< / answer></answer>", set()),
    (f"{L}<reason>a<|im_end|></reason>{A}", set()),
    (f"<|im_start|>{L}{R}{A}", set()),
    (f"{L}<reason><|image_pad|></reason>{A}", set()),
    (f"{L}{R}<answer></ answer></answer>", set()),
    (f"{L}<reason>a<|image_pad|></reason>{A}", set()),
]


@pytest.mark.parametrize(("text", "modes"), RESPONSES)
@pytest.mark.parametrize("mode", ["any", "reason_first", "text"])
def test_format_reward(text, modes, mode):
    assert format_reward(text, mode) == (1.0 if mode in modes else 0.0)


def test_any_is_the_default():
    assert format_reward(L + R + A) == 1.0 and format_reward(R + A) == 0.0


def test_the_tokens_are_those_of_the_grammar():
    for token, letter in ((tokens.START, "s"), (tokens.LATENT, "z"), (tokens.END, "e")):
        assert module._LETTERS[token] == letter


def test_an_unknown_mode_is_refused():
    with pytest.raises(RewardError, match="expected one of any, reason_first, text, found 'latent_first'"):
        format_reward(A, "latent_first")


RAMBLING = ["<", "<|", "< ", "</", "<reason>", "</reason>", "<answer>", R, L, L + R, "<|latent|>", "a ", "<|a", " \n"]


@pytest.mark.parametrize("piece", RAMBLING)
@pytest.mark.parametrize("before", ["", L])
def test_a_hundred_thousand_characters_are_read_quickly(piece, before):
    text = before + piece * (100_000 // len(piece))
    start = time.perf_counter()
    format_reward(text)
    format_reward(f"{text}<{' ' * 50_000}reason", "text")
    assert time.perf_counter() - start < 1.0


def test_a_very_long_response_is_still_accepted():
    assert format_reward(R + (L + R) * 5000 + A) == 1.0
