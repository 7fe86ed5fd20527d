"""From records to batches: the exact text, the spans, the labels, and that training shows what evaluation shows."""

import copy
import dataclasses
import importlib.util
import random

import numpy as np
import pytest
import torch
import yaml

from future_l1_plugin.data.frame_choice import Evenly
from future_l1_plugin.data.frames import VideoFrames
from future_l1_plugin.data.record_files import Records
from future_l1_plugin.data.records import Frame, Text, TwiffRecord
from future_l1_plugin.data.scenes import clip, seen_clip
from future_l1_plugin.data.sft import IGNORED, SftCollator, SftDataset, SftSample, assistant_content, check_records
from future_l1_plugin.data.video_writer import write_video
from future_l1_plugin.data.world_questions import draw_question, futurebench_item, sft_record
from future_l1_plugin.errors import ConfigError, DataError
from future_l1_plugin.integrations.lmms_eval.inputs import InputBuilder
from future_l1_plugin.latent.tokens import END, LATENT, START
from future_l1_plugin.model import LatentConfig
from future_l1_plugin.model.template import SYSTEM_PROMPT, chat_template
from future_l1_plugin.paths import lmms_tasks_dir

SPAN4 = START + LATENT * 4 + END
PICTURE = "<|vision_start|>" + "<|image_pad|>" * 4 + "<|vision_end|>"  # a 64x64 question frame


@pytest.fixture(scope="module")
def parts(tiny_path):
    """(processor, latent configuration) of the tiny checkpoint."""
    from transformers import AutoConfig, AutoProcessor

    processor = AutoProcessor.from_pretrained(tiny_path)
    return processor, LatentConfig.from_hf(AutoConfig.from_pretrained(tiny_path))


def collator(parts, **keywords):
    latent = {k: keywords.pop(k) for k in list(keywords) if k in LatentConfig.__dataclass_fields__}
    return SftCollator(parts[0], dataclasses.replace(parts[1], **latent), **keywords)


def record(**changes):
    fields = dict(
        id="r1",
        video="clip.mp4",
        question="frame_1\n<image>\nframe_3\n<image>\nWhere will it be?\nA. aw\nB. by",
        image=[1, 3],
        reasoning=(Text("it moves right"), Frame(4), Text("then"), Frame(5), Text("it is at by")),
        answer="B",
    )
    return TwiffRecord(**(fields | changes))


def frames(count, height=64, width=64, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 255, (count, height, width, 3), dtype=np.uint8)
    return VideoFrames(pixels, list(range(count)), 2.0, 10, "clip.mp4", "pyav")


def sample(rec=None, height=64, width=64, spans=True, seed=0):
    rec = rec or record()
    future = frames(len(rec.reasoning_image), height, width, seed + 1) if spans else None
    return SftSample(rec, frames(len(rec.image), 64, 64, seed), future)


def decode(parts, ids, mask=None):
    return parts[0].tokenizer.decode(ids if mask is None else ids[mask.bool()], skip_special_tokens=False)


def spans(parts, row):
    """Lengths of the spans of a row of ids, in order."""
    text = decode(parts, row)
    return [piece.split(END)[0].count(LATENT) for piece in text.split(START)[1:]]


# ---- the text -------------------------------------------------------------------------------------------------------


def test_exact_text_with_images(parts):
    batch = collator(parts)([sample()])
    assert decode(parts, batch["input_ids"][0]) == (
        "<|im_start|>user\n"
        f"frame_1\n{PICTURE}\nframe_3\n{PICTURE}\nWhere will it be?\nA. aw\nB. by<|im_end|>\n"
        "<|im_start|>assistant\n"
        f"<reason>it moves right</reason>{SPAN4}<reason>then</reason>{SPAN4}<reason>it is at by</reason>"
        "<answer>B</answer><|im_end|>\n"
    )
    assert batch["pixel_values"].shape == (2 * 16, 3 * 2 * 16 * 16)
    assert batch["image_grid_thw"].tolist() == [[1, 4, 4]] * 2
    assert batch["latent_grid_thw"].tolist() == [[1, 4, 4]] * 2
    assert batch["latent_pixel_values"].shape == batch["pixel_values"].shape
    assert batch["latent_frames"].tolist() == [2]


def test_exact_text_with_a_video(parts):
    batch = collator(parts, question_media="video")([sample()])
    still = "<|vision_start|>" + "<|video_pad|>" * 4 + "<|vision_end|>"
    # Two frames per second: each question frame is held for a temporal patch, stamped with the middle of it.
    # transformers 5 keeps the template's vision markers around those of the frames.
    assert decode(parts, batch["input_ids"][0]) == (
        f"<|im_start|>user\n<|vision_start|><0.1 seconds>{still}<0.6 seconds>{still}<|vision_end|>"
        "Where will it be?\nA. aw\nB. by<|im_end|>\n"
        "<|im_start|>assistant\n"
        f"<reason>it moves right</reason>{SPAN4}<reason>then</reason>{SPAN4}<reason>it is at by</reason>"
        "<answer>B</answer><|im_end|>\n"
    )
    assert batch["video_grid_thw"].tolist() == [[2, 4, 4]]
    assert "pixel_values" not in batch
    assert "video_metadata" not in batch


def test_a_question_without_placeholders_shows_its_frames_first(parts):
    batch = collator(parts)([sample(record(question="Where?"))])
    assert decode(parts, batch["input_ids"][0]).startswith(f"<|im_start|>user\n{PICTURE}{PICTURE}Where?<|im_end|>")


def test_a_system_prompt_in_the_template_comes_first(parts):
    processor = copy.deepcopy(parts[0])
    processor.chat_template = chat_template(SYSTEM_PROMPT)  # it spells the span markers
    batch = collator((processor, parts[1]))([sample()])
    text = decode(parts, batch["input_ids"][0])
    assert text.startswith(f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>\n<|im_start|>user\n")
    learned = batch["labels"][0] != IGNORED
    assert decode(parts, batch["input_ids"][0], learned).startswith("<reason>it moves right</reason>")


def test_assistant_content_without_spans_joins_neighbouring_thoughts():
    texts = [part.get("text") for part in assistant_content(record(), spans=False)]
    assert texts == ["<reason>it moves right then it is at by</reason>", "<answer>B</answer>"]
    first = record(reasoning=(Frame(4), Text("a"), Frame(5), Frame(6), Text("b")))
    assert [p.get("text") for p in assistant_content(first, False)] == ["<reason>a b</reason>", "<answer>B</answer>"]
    nothing = record(reasoning=(Frame(4),))
    assert [p.get("text") for p in assistant_content(nothing, False)] == ["<answer>B</answer>"]


def test_the_text_only_control_is_the_latent_text_without_spans(parts):
    latent = collator(parts)([sample()])
    control = collator(parts, spans=False)([sample(spans=False)])
    expected = decode(parts, latent["input_ids"][0]).replace(SPAN4, "").replace("</reason><reason>", " ")
    assert decode(parts, control["input_ids"][0]) == expected
    assert control["latent_frames"].tolist() == [0]
    assert "latent_pixel_values" not in control
    assert torch.equal(control["pixel_values"], latent["pixel_values"])


def test_a_blank_picture_stands_for_what_a_batch_lacks(parts):
    """Ranks must run the vision tower equally often; see `model.objective`. No token stands for a blank picture."""
    without = record(reasoning=(Text("it moves"),), question="Where will it be?", image=[])
    batch = collator(parts)([sample(without), sample(without)])
    for name in ("latent", "blank"):
        assert batch[f"{name}_grid_thw"].tolist() == [[1, 2, 2]]  # one token of 2 x 2 patches
    assert batch["latent_frames"].tolist() == [0, 0] and spans(parts, batch["input_ids"][0]) == []
    assert "pixel_values" not in batch
    mixed = collator(parts)([sample(without), sample()])
    assert mixed["latent_frames"].tolist() == [0, 2] and len(mixed["latent_grid_thw"]) == 2
    assert not [key for key in mixed if key.startswith("blank")]
    control = collator(parts, spans=False)([sample(without, spans=False)])
    assert "latent_pixel_values" not in control and "blank_pixel_values" in control


# ---- spans ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width", "most", "length"),
    [
        (64, 64, 4, 4),  # as it is: 2x2 cells of 32 pixels
        (64, 64, 1, 1),
        (64, 64, 16, 4),  # never enlarged beyond what it has
        (96, 64, 4, 2),  # 6 cells are too many: 32x64
        (96, 64, 16, 6),
        (96, 64, 1, 1),
        (90, 160, 4, 2),  # 16:9: 32x64
        (90, 160, 16, 15),  # 96x160
        (90, 160, 1, 1),
        (32, 32, 4, 1),
        (32, 32, 16, 1),
        (20, 20, 4, 1),  # each side is at least 32
        (16, 40, 4, 2),  # 32x64
        (256, 256, 16, 16),
        (256, 256, 4, 4),
    ],
)
def test_span_lengths(parts, height, width, most, length):
    batch = collator(parts, max_latent_token=most)([sample(height=height, width=width)])
    assert spans(parts, batch["input_ids"][0]) == [length, length]
    t, h, w = batch["latent_grid_thw"][0].tolist()  # in patches of 16 pixels
    assert (t, (h * 16 / 32) * (w * 16 / 32)) == (1, length)
    assert min(h, w) * 16 >= 32
    assert length <= most


def test_a_fixed_budget_overrides_the_size(parts):
    for budget in (1, 3, 8):
        batch = collator(parts, train_fixed_latent_budget=budget)([sample(), sample(height=32, width=32)])
        assert [spans(parts, row) for row in batch["input_ids"]] == [[budget] * 2] * 2
        assert batch["latent_grid_thw"].tolist() == [[1, 4, 4]] * 2 + [[1, 2, 2]] * 2  # pooled by the loss, not here


def test_rows_keep_their_own_frames(parts):
    """Rows of different sizes and counts: spans, grids and pixels stay in order."""
    one = record(id="one", reasoning=(Text("a"), Frame(4), Text("b")))
    none = record(id="none", reasoning=(Text("a"),))
    rows = [sample(seed=10), sample(one, 32, 32, seed=20), sample(none, seed=30), sample(height=32, width=64, seed=40)]
    batch = collator(parts)(rows)
    assert [spans(parts, row) for row in batch["input_ids"]] == [[4, 4], [1], [], [2, 2]]
    assert batch["latent_frames"].tolist() == [2, 1, 0, 2]
    assert batch["latent_grid_thw"].tolist() == [[1, 4, 4]] * 2 + [[1, 2, 2]] + [[1, 2, 4]] * 2
    alone = collator(parts)([rows[3]])
    assert torch.equal(batch["latent_pixel_values"][-16:], alone["latent_pixel_values"])
    assert torch.equal(batch["pixel_values"][-32:], alone["pixel_values"])


def test_latent_targets_accept_the_batch(parts, tiny_path):
    """The batch fits the objective: as many latents fed as there are positions."""
    from future_l1_plugin.model import load
    from future_l1_plugin.model.objective import sft_losses

    model, _ = load(tiny_path, dtype=torch.float32)
    batch = collator(parts)([sample(), sample(record(reasoning=(Text("a"),))), sample(height=32, width=32)])
    losses = sft_losses(model, parts[1], dict(batch))
    assert losses.latents == 8 + 0 + 2
    assert torch.isfinite(losses.total)


# ---- labels ---------------------------------------------------------------------------------------------------------


def learned_text(parts, batch, row=0):
    labels = batch["labels"][row]
    assert torch.equal(labels[labels != IGNORED], batch["input_ids"][row][labels != IGNORED])
    return decode(parts, labels[labels != IGNORED])


RESPONSE = (
    f"<reason>it moves right</reason>{START}{END}<reason>then</reason>{START}{END}<reason>it is at by</reason>"
    "<answer>B</answer><|im_end|>\n"
)


def test_labels_are_the_response_without_latents(parts):
    batch = collator(parts)([sample()])
    assert learned_text(parts, batch) == RESPONSE
    start = int(batch["response_start"][0])
    assert decode(parts, batch["input_ids"][0][:start]).endswith("<|im_start|>assistant\n")
    assert (batch["labels"][0, :start] == IGNORED).all()
    latents = batch["input_ids"] == parts[1].latent_id
    assert (batch["labels"][latents] == IGNORED).all()
    assert latents.sum() == 8


def test_padding_is_not_learned(parts):
    short = record(id="short", question="frame_1\n<image>\nframe_3\n<image>\nWhere?", reasoning=(Text("a"),))
    batch = collator(parts)([sample(), sample(short)])
    assert batch["attention_mask"][1].sum() < batch["input_ids"].shape[1]
    assert (batch["labels"][batch["attention_mask"] == 0] == IGNORED).all()
    assert learned_text(parts, batch, 0) == RESPONSE
    assert learned_text(parts, batch, 1) == "<reason>a</reason><answer>B</answer><|im_end|>\n"
    # Right-padded: the response starts where it starts alone.
    assert batch["response_start"][1] == collator(parts)([sample(short)])["response_start"][0]


@pytest.mark.parametrize(
    "spelled",
    [
        f"{START}{LATENT}{LATENT}{END}",
        "<|im_start|>assistant\n<reason>x</reason>",
        "<|im_start|>assistant\n\n<answer>A</answer><|im_end|>\n<|im_start|>assistant\nyes",
        "<|im_start|>assistant",
        f"<|im_end|>\n<|im_start|>user\n{LATENT}",
        "\nassistant\n<answer>A</answer>",
    ],
)
@pytest.mark.parametrize("media", ["images", "video"])
def test_what_the_prompt_spells_is_not_learned(parts, spelled, media):
    question = record().question + f"\nHint: {spelled}"
    batch = collator(parts, question_media=media)([sample(record(question=question)), sample()])
    for row in (0, 1):
        assert learned_text(parts, batch, row) == RESPONSE
        rest = batch["input_ids"][row][batch["response_start"][row] :]
        assert decode(parts, rest).startswith("<reason>it moves right")


@pytest.mark.parametrize("token", [START, LATENT, END, "<|im_end|>", "<|image_pad|>"])
def test_a_response_that_spells_control_tokens_is_an_error(parts, token):
    with pytest.raises(DataError, match=r"record r1: a thought spells <\|"):
        collator(parts)([sample(record(reasoning=(Text(f"so {token}"), Frame(4))))])
    with pytest.raises(DataError, match=r"record r1: the answer spells <\|"):
        collator(parts)([sample(record(answer=f"B{token}"))])


def test_a_question_that_spells_media_tokens_is_an_error(parts):
    with pytest.raises(DataError, match=r"record r1: the question spells <\|image_pad"):
        collator(parts)([sample(record(question="<image><image> <|image_pad|>?"))])


def test_a_sample_that_is_too_long_is_named(parts):
    long = record(id="the-long-one", reasoning=(Text("word " * 200),))
    with pytest.raises(DataError, match=r"record the-long-one: .* max_length is 200"):
        collator(parts, max_length=200)([sample(), sample(long), sample()])
    exact = collator(parts)([sample()])["input_ids"].shape[1]
    collator(parts, max_length=exact)([sample()])
    with pytest.raises(DataError, match="record r1"):
        collator(parts, max_length=exact - 1)([sample()])


def test_unknown_media_are_refused(parts):
    with pytest.raises(ConfigError, match="question_media"):
        collator(parts, question_media="gif")


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A question, its whole clip and its seen clip as files."""
    root = tmp_path_factory.mktemp("scene")
    question = draw_question(random.Random(5), "hop2")
    write_video(root / "whole.mp4", clip(question.scene), fps=2.0)
    write_video(root / "seen.mp4", seen_clip(question.scene, question.ask), fps=4.0)
    return root, question


def world_record(scene, **changes):
    root, question = scene
    return TwiffRecord.from_dict({**sft_record(question, "q", "whole.mp4"), **changes}, root)


def test_the_dataset_reads_the_frames_of_the_record(scene):
    made = SftDataset([world_record(scene)])[0]
    drawn = clip(scene[1].scene).astype(int)
    assert made.question_clip.frames.shape == (4, 64, 64, 3)
    assert abs(made.question_clip.frames - drawn[1:5]).mean() < 5
    assert abs(made.future.frames - drawn[5:7]).mean() < 5
    assert SftDataset([world_record(scene)], spans=False)[0].future is None


def test_the_cache_changes_nothing(scene):
    cached = SftDataset([world_record(scene)] * 2, cache_bytes=2**20)
    first, second, plain = cached[0], cached[1], SftDataset([world_record(scene)])[0]
    assert (first.future.frames == plain.future.frames).all()
    assert (second.question_clip.frames == plain.question_clip.frames).all()


def broken(scene, tmp_path, how):
    file = tmp_path / "bad.mp4"
    whole = (scene[0] / "whole.mp4").read_bytes()
    if how == "empty":
        file.write_bytes(b"")
    elif how == "cut off":
        file.write_bytes(whole[: len(whole) // 2])
    elif how == "noise":
        file.write_bytes(b"not a video " * 100)
    return file


@pytest.mark.parametrize("how", ["missing", "empty", "cut off", "noise"])
def test_a_bad_video_names_its_record(scene, tmp_path, how):
    bad = dataclasses.replace(world_record(scene), id="bad-one", video=str(broken(scene, tmp_path, how)))
    with pytest.raises(DataError, match=r"record bad-one: .*bad.mp4"):
        SftDataset([world_record(scene), bad])[1]


def test_records_are_checked_before_training(scene, tmp_path):
    good = world_record(scene)
    bad = [dataclasses.replace(good, id=f"gone-{i:02d}", video=str(tmp_path / f"{i}.mp4")) for i in range(11)]
    bad.append(dataclasses.replace(good, id="cut", video=str(broken(scene, tmp_path, "cut off"))))
    bad.append(dataclasses.replace(good, id="words", answer=f"B {END}"))
    records = Records([bad[0], good, *bad[1:]])
    with pytest.raises(DataError) as caught:
        check_records(records)
    message = str(caught.value)
    assert message.startswith("13 of 14 records cannot be trained on.")
    assert "the other 1 by `on_bad: skip`" in message
    assert [f"gone-{i:02d}" in message for i in range(11)] == [True] * 10 + [False]  # the first ten are listed
    assert "and 3 more" in message
    kept = check_records(records, on_bad="skip")
    assert kept.items == [good]
    assert [item.id for item in kept.bad] == [record.id for record in bad]
    assert "cut off" in kept.bad[11].reason
    assert "<|latent_end|>" in kept.bad[12].reason
    with pytest.raises(DataError, match="2 of 2"):
        check_records(Records(bad[:2]), on_bad="skip")  # nothing would be left
    assert check_records(Records([good])).items == [good]


def test_a_question_without_frames(parts, scene):
    """Shown as images it has none, not even beside future frames; as a video it cannot be shown."""
    good = world_record(scene)
    silent = dataclasses.replace(good, id="silent", question="Where?", image=[])
    assert check_records(Records([silent])).items == [silent]
    (shown,) = SftDataset([silent], spans=False)
    assert (len(shown.question_clip.frames), shown.future) == (0, None)
    with pytest.raises(DataError, match=r"silent: its question has no frames .* question_media=video"):
        check_records(Records([good, silent]), question_media="video")
    assert check_records(Records([good, silent]), "skip", "video").items == [good]
    with pytest.raises(DataError, match="record silent: its question has no frames"):  # unchecked
        collator(parts, question_media="video")([SftDataset([silent])[0]])


# ---- training shows what evaluation shows ---------------------------------------------------------------------------


def test_training_and_evaluation_give_the_model_the_same(parts, scene):
    """One scene: the SFT record cuts the question out of the whole clip, futurebench shows the seen clip."""
    root, question = scene
    processor = parts[0]
    batch = collator(parts, question_media="video")(list(SftDataset([world_record(scene)])))
    item = futurebench_item(question, "q", "seen.mp4")
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "video", "url": str(root / "seen.mp4")},
                {"type": "text", "text": eval_text(item)},
            ],
        }
    ]
    inputs = InputBuilder(processor, Evenly(32))(messages)
    start = int(batch["response_start"][0])
    assert batch["input_ids"][0, :start].tolist() == inputs["input_ids"][0].tolist()
    assert batch["mm_token_type_ids"][0, :start].tolist() == inputs["mm_token_type_ids"][0].tolist()
    assert torch.equal(batch["video_grid_thw"], inputs["video_grid_thw"])
    assert batch["pixel_values_videos"].shape == inputs["pixel_values_videos"].shape
    # Pixels are in -1..1. The two files were encoded apart, so they agree up to the codec.
    error = (batch["pixel_values_videos"] - inputs["pixel_values_videos"]).abs()
    assert error.mean() < 0.02
    other = draw_question(random.Random(6), "hop2")
    write_video(root / "other.mp4", seen_clip(other.scene, other.ask), fps=4.0)
    messages[0]["content"][0]["url"] = str(root / "other.mp4")
    stranger = InputBuilder(processor, Evenly(32))(messages)["pixel_values_videos"]
    assert (batch["pixel_values_videos"] - stranger).abs().mean() > 2 * error.mean()  # the bound above says something


def eval_text(item):
    """The prompt as the futurebench task builds it for future_l1."""

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: node.value)
    folder = lmms_tasks_dir() / "futurebench"
    spec = importlib.util.spec_from_file_location("futurebench_utils", folder / "utils.py")
    utils = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(utils)
    task = yaml.load((folder / "futurebench.yaml").read_text(), Loader)
    return utils.doc_to_text(item, task["lmms_eval_specific_kwargs"]["future_l1"])


def test_a_question_frame_in_a_video_looks_as_a_future_frame_does(parts):
    """The same pictures as question and as future: the same patches reach the vision tower."""
    shown = sample()
    same = dataclasses.replace(shown, future=shown.question_clip)
    batch = collator(parts, question_media="video")([same])
    assert torch.equal(batch["pixel_values_videos"], batch["latent_pixel_values"])
