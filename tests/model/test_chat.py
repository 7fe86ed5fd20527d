"""`future-l1 generate` through the command line: streamed text, spans as markers, and errors that end with code 2."""

import io
import re

import numpy as np
import pytest
import torch
from made import opening_checkpoint
from PIL import Image

from future_l1_plugin.cli import main
from future_l1_plugin.data import make_world
from future_l1_plugin.data.video_writer import write_video
from future_l1_plugin.errors import DataError
from future_l1_plugin.integrations.chat import SpanStreamer, answer
from future_l1_plugin.latent import LatentTokens
from future_l1_plugin.model import load, make_tiny

SPAN = re.compile(r"\[latent x(\d+)( \(cut off\))?\]")


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    world = make_world(tmp_path_factory.mktemp("world"), test=16, train=16, progress=False)
    return sorted(world.videos.glob("train/*.mp4"))[0]


@pytest.fixture(scope="module")
def spanning(tiny_path, tmp_path_factory):
    """The tiny checkpoint, told to open each response with a span of exactly 4 latents."""
    return opening_checkpoint(tiny_path, tmp_path_factory.mktemp("spanning") / "tiny", fixed_latent_budget=True)


@pytest.fixture()
def picture(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def ask(capsys, model, *arguments, steps=12):
    """(exit code, standard output, the last line of standard error)."""
    code = main(["generate", "--model", str(model), "--question", "Where?", "--max-new-tokens", str(steps), *arguments])
    captured = capsys.readouterr()
    return code, captured.out, (captured.err.strip().splitlines() or [""])[-1]


def visible(out):
    return out.removesuffix("\n")


def test_video(spanning, video, capsys):
    code, out, _ = ask(capsys, spanning, "--video", str(video))
    assert code == 0
    assert out.startswith("[latent x4]") and out.endswith("\n") and "<|latent" not in out
    assert len(SPAN.sub("", visible(out))) > 0
    # The same seed says the same; the question's frames matter.
    assert ask(capsys, spanning, "--video", str(video))[1] == out


def test_pictures_and_video_and_words_alone(spanning, video, picture, capsys):
    outs = [
        ask(capsys, spanning, "--image", str(picture), "--image", str(picture), "--video", str(video))[:2],
        ask(capsys, spanning, "--image", str(picture))[:2],
        ask(capsys, spanning)[:2],
    ]
    assert [code for code, _ in outs] == [0, 0, 0]
    assert all(out.startswith("[latent x4]") for _, out in outs)


def test_all_flags_arrive(monkeypatch):
    from future_l1_plugin.integrations import chat

    calls = []
    monkeypatch.setattr(chat, "answer", lambda *args, **kwargs: calls.append((args, kwargs)))
    flags = "--model M --question Q --video V --image A --image B --frames 5 --max-new-tokens 6 --temperature 0.7"
    assert main(["generate", *flags.split(), "--seed", "8", "--device", "cpu"]) == 0
    expected = dict(images=["A", "B"], video="V", num_frames=5, max_new_tokens=6, temperature=0.7, seed=8, device="cpu")
    assert calls == [(("M", "Q"), expected)]


def test_what_the_flags_do(spanning, video):
    def say(**keywords):
        return answer(str(spanning), "Where?", video=str(video), max_new_tokens=12, out=io.StringIO(), **keywords)

    hot = [say(temperature=2.0, seed=seed, num_frames=2) for seed in (1, 1, 2)]
    assert hot[0].text == hot[1].text != hot[2].text
    # Two frames make one temporal patch, the clip's ten make five; a timestamp and two markers go with each.
    lengths = [say(num_frames=n).prompt_tokens for n in (2, 10, 32)]
    assert lengths[1] - lengths[0] >= 4 * (4 + 2) and lengths[1] == lengths[2]


def test_a_span_that_is_cut_off(spanning, video, capsys):
    assert ask(capsys, spanning, "--video", str(video), steps=3)[1] == "[latent x2 (cut off)]\n"
    assert ask(capsys, spanning, "--video", str(video), steps=1)[1] == "[latent x0 (cut off)]\n"


def test_the_stream_is_the_text(spanning, video):
    out = io.StringIO()
    output = answer(str(spanning), "Where?", video=str(video), max_new_tokens=40, out=out)
    expected = re.sub(
        r"<\|latent_start\|>((?:<\|latent\|>)*)(<\|latent_end\|>)?",
        lambda m: f"[latent x{len(m[1]) // len('<|latent|>')}{'' if m[2] else ' (cut off)'}]",
        output.text,
    )
    assert visible(out.getvalue()) == expected
    assert sum(int(n) for n, _ in SPAN.findall(expected)) == len(output.latents)


def test_one_frame_video(spanning, tmp_path, capsys):
    write_video(tmp_path / "one.mp4", np.full((1, 64, 64, 3), 90, dtype=np.uint8), fps=2.0)
    code, out, _ = ask(capsys, spanning, "--video", str(tmp_path / "one.mp4"))
    assert code == 0 and out.startswith("[latent x4]")


def broken_media(tmp_path, video, picture):
    """name -> (arguments, what the message must say)."""
    files = {
        "cut.mp4": video.read_bytes()[: video.stat().st_size // 2],
        "empty.mp4": b"",
        "words.mp4": b"no video" * 50,
        "words.png": b"no picture",
        "cut.png": picture.read_bytes()[: picture.stat().st_size // 2],
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    return {
        "missing video": ("--video", tmp_path / "missing.mp4", "missing.mp4: no such video. Check the path"),
        "truncated video": ("--video", tmp_path / "cut.mp4", "cut.mp4: the file is cut off"),
        "empty video": ("--video", tmp_path / "empty.mp4", r"empty.mp4: the file is empty"),
        "no video": ("--video", tmp_path / "words.mp4", "words.mp4: "),
        "missing picture": ("--image", tmp_path / "missing.png", "missing.png: expected a whole picture"),
        "no picture": ("--image", tmp_path / "words.png", "words.png: expected a whole picture"),
        "truncated picture": ("--image", tmp_path / "cut.png", "cut.png: expected a whole picture"),
        "folder": ("--image", tmp_path, ": expected a whole picture"),
    }


@pytest.mark.parametrize(
    "name",
    [
        "missing video",
        "truncated video",
        "empty video",
        "no video",
        "missing picture",
        "no picture",
        "truncated picture",
        "folder",
    ],
)
def test_broken_media(spanning, video, picture, tmp_path, capsys, name):
    flag, path, message = broken_media(tmp_path, video, picture)[name]
    code, out, error = ask(capsys, spanning, flag, str(path))
    assert (code, out) == (2, "")
    assert error.startswith(f"future-l1 generate: {path}") and re.search(message, error)
    keywords = {"video": str(path)} if flag == "--video" else {"images": [str(path)]}
    with pytest.raises(DataError, match=message):
        answer(str(spanning), "Where?", **keywords)


def test_checkpoints_that_cannot_be_used(tmp_path, spanning, video, capsys):
    plain = make_tiny(tmp_path / "plain", latent=False)
    code, out, error = ask(capsys, plain, "--video", str(video))
    assert (code, out) == (2, "")
    assert "missing are latent_id" in error and "future-l1 convert BASE OUT" in error
    code, out, error = ask(capsys, tmp_path / "nowhere", "--video", str(video))
    assert (code, out) == (2, "") and "nowhere: no such folder" in error
    code, out, error = ask(capsys, spanning, "--temperature", "-1")
    assert code == 2 and "expected temperature >= 0" in error


# ---------------------------------------------------------------------------------------------------------------------
# The streamer alone
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tiny_path):
    return load(tiny_path)[1].tokenizer


def stream(tokenizer, ids):
    out, tokens = io.StringIO(), LatentTokens.from_tokenizer(tokenizer)
    streamer, shown = SpanStreamer(tokenizer, tokens, out), []
    for token in ids:
        streamer(torch.tensor([token]), torch.tensor([token == tokens.latent]))
        shown.append(out.getvalue())
    streamer.finish()
    return out.getvalue(), shown


def test_spans_show_when_they_close(tokenizer):
    text = "a<|latent_start|><|latent|><|latent|><|latent_end|><|latent_start|><|latent_end|>b<|im_end|>"
    final, shown = stream(tokenizer, tokenizer(text)["input_ids"])
    assert final == "a[latent x2][latent x0]b\n"
    assert shown[:5] == ["a", "a", "a", "a", "a[latent x2]"]


def test_characters_of_several_tokens_come_whole(tokenizer):
    ids = tokenizer("é東")["input_ids"]
    assert len(ids) == 5  # byte by byte
    final, shown = stream(tokenizer, ids)
    assert final == "é東\n" and shown == ["", "é", "é", "é", "é東"]
    # A half character is not lost, and stays where it was.
    assert stream(tokenizer, ids[:-1])[0] == "é\ufffd\n"
    spans = tokenizer("<|latent_start|><|latent|><|latent_end|>b")["input_ids"]
    assert stream(tokenizer, ids[:1] + spans)[0] == "\ufffd[latent x1]b\n"
