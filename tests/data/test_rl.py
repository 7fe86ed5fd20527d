"""RL prompts: what is read from which schema, what is refused, and that RL shows what SFT and evaluation show."""

import dataclasses
import importlib.util
import json
import random
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageFile

from future_l1_plugin.data import FrameCache, make_world
from future_l1_plugin.data.frame_choice import Evenly, Pool
from future_l1_plugin.data.futurebench import load_items
from future_l1_plugin.data.prompt import RlPrompt, chat_messages, encode_prompt, listed_options
from future_l1_plugin.data.record_files import load_records
from future_l1_plugin.data.rl import load_prompts
from future_l1_plugin.data.scenes import clip, seen_clip
from future_l1_plugin.data.sft import SftCollator, SftDataset
from future_l1_plugin.data.video_writer import write_video
from future_l1_plugin.data.world_questions import draw_question, futurebench_item
from future_l1_plugin.errors import ConfigError, DataError
from future_l1_plugin.integrations.lmms_eval.inputs import InputBuilder
from future_l1_plugin.model import LatentConfig
from future_l1_plugin.paths import lmms_tasks_dir
from future_l1_plugin.rewards.answer import option_letter


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"), test=16, train=16, seed=0, progress=False)


@pytest.fixture(scope="module")
def processor(tiny_path):
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(tiny_path)


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_video(path, clip(draw_question(random.Random(3), "hop2").scene), fps=2.0)
    return path


@pytest.fixture
def pictures(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("one.png", "two.png"):
        Image.fromarray(rng.integers(0, 255, (64, 96, 3), dtype=np.uint8)).save(tmp_path / name)
    return tmp_path


def write(path, rows):
    if path.suffix == ".parquet":
        columns = dict.fromkeys(key for row in rows for key in row)
        pq.write_table(pa.table({key: [row.get(key) for row in rows] for key in columns}), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text(json.dumps(rows))
    return path


def twiff(clip_file, **changes):
    row = {
        "id": "t1",
        "conversations": [
            {"from": "human", "value": "frame_1\n<image>\nframe_3\n<image>\nWhat comes next?"},
            {"from": "gpt", "value": "THOUGHT 0: it moves\n<image>\nTHOUGHT 1: so"},
        ],
        "video": str(clip_file),
        "image": [1, 3],
        "reasoning_image": [5],
        "answer": "it falls",
    }
    return {**row, **changes}


def bench(clip_file, **changes):
    row = {
        "id": "f1",
        "video_path": f"/data/video_dataset/{clip_file.name}",
        "question_type": "hop3",
        "qa": {"Question": "Where?", "Options": {"A": "aw", "B": "by", "C": "cx", "D": "dz"}, "Answer": "b"},
    }
    return {**row, **changes}


def asked(question, clip_file, answer="it falls"):
    """A TwiFF row with this question behind two frames."""
    turns = [{"from": "human", "value": "<image><image>\n" + question}, {"from": "gpt", "value": "so\n<image>"}]
    return twiff(clip_file, conversations=turns, answer=answer)


# ---- the three schemas ----------------------------------------------------------------------------------------------


def test_twiff_rows_as_images(tmp_path, clip_file):
    (prompt,) = load_prompts(write(tmp_path / "a.json", [twiff(clip_file)]))
    assert prompt == RlPrompt(
        id="t1",
        question="frame_1\n<image>\nframe_3\n<image>\nWhat comes next?",
        media="images",
        video=str(clip_file),
        frames=Pool((1, 3)),
        ground_truth="it falls",
        kind="text",
        source="twiff",
    )
    assert chat_messages(prompt) == [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "frame_1\n"},
                {"type": "image"},
                {"type": "text", "text": "\nframe_3\n"},
                {"type": "image"},
                {"type": "text", "text": "\nWhat comes next?"},
            ],
        }
    ]


def test_twiff_rows_as_a_video(tmp_path, clip_file):
    (prompt,) = load_prompts(write(tmp_path / "a.json", [twiff(clip_file)]), question_media="video")
    assert (prompt.media, prompt.question, prompt.frames) == ("video", "What comes next?", Pool((1, 3)))
    content = [{"type": "video"}, {"type": "text", "text": "What comes next?"}]
    assert chat_messages(prompt) == [{"role": "user", "content": content}]


def test_the_three_spellings_of_twiff_give_the_same_prompt(tmp_path, clip_file):
    row = twiff(clip_file)
    human, gpt = (turn["value"] for turn in row["conversations"])
    interleave = {**row, "frames": row["image"], "recon_frames": row["reasoning_image"]}
    interleave["conversations"] = [
        row["conversations"][0],
        {"from": "gpt", "value": gpt.replace("<image>", "<rimage>")},
    ]
    raw = {
        "id": "t1",
        "video": row["video"],
        "question": human,
        "answer": gpt.replace("<image>", "<rimage>") + "<ans>it falls</ans>",
        "question_images_index": [1, 3],
        "reasoning_images_index": [5],
    }
    interleave = {key: value for key, value in interleave.items() if key not in ("image", "reasoning_image")}
    prompts = [load_prompts(write(tmp_path / f"{i}.json", [r]))[0] for i, r in enumerate((row, interleave, raw))]
    assert prompts[0] == prompts[1] == prompts[2]


def test_futurebench_items(tmp_path, clip_file):
    path = write(tmp_path / "b.json", [bench(clip_file)])
    (prompt,) = load_prompts(path, video_root=clip_file.parent, num_frames=6)
    assert prompt == RlPrompt(
        id="f1",
        question="Where?\nA. aw\nB. by\nC. cx\nD. dz\nPut only the option letter within <answer></answer>.",
        media="video",
        video=str(clip_file),
        frames=Evenly(6),
        ground_truth="B",
        options={"A": "aw", "B": "by", "C": "cx", "D": "dz"},
        kind="choice",
        source="futurebench/hop3",
    )


def test_plain_rows(pictures):
    rows = [
        {"id": "none", "question": "What is 6 times 7?", "answer": 42, "kind": "maths"},
        {"id": "front", "question": "Alike?", "answer": "no", "images": ["one.png", "two.png"], "note": "mine"},
        {"id": "within", "question": "Is <image> above <image>?", "answer": "no", "images": ["one.png", "two.png"]},
        {"id": "options", "question": "Which?", "answer": "B", "options": ["red", "blue"]},
        {"id": "listed", "question": "Which?\nA. red\nB. blue", "answer": "blue"},
        {"question": "Say hello.", "answer": "hello"},
    ]
    prompts = load_prompts(write(pictures / "mine.jsonl", rows))
    none, front, within, options, listed, unnamed = prompts
    assert none == RlPrompt(
        id="none", question="What is 6 times 7?", media="none", ground_truth="42", kind="maths", source="plain/mine"
    )
    assert chat_messages(none) == [{"role": "user", "content": [{"type": "text", "text": "What is 6 times 7?"}]}]
    paths = (str(pictures / "one.png"), str(pictures / "two.png"))
    assert (front.media, front.images, front.kind) == ("images", paths, "text")
    assert [part["type"] for part in chat_messages(front)[0]["content"]] == ["image", "image", "text"]
    assert [part["type"] for part in chat_messages(within)[0]["content"]] == ["text", "image", "text", "image", "text"]
    assert options.question == "Which?\nA. red\nB. blue\nPut only the option letter within <answer></answer>."
    assert (options.options, options.kind) == ({"A": "red", "B": "blue"}, "choice")
    assert listed.question == "Which?\nA. red\nB. blue"
    assert (listed.options, listed.kind, listed.ground_truth) == ({"A": "red", "B": "blue"}, "choice", "blue")
    assert unnamed.id == "mine.jsonl:6"


@pytest.mark.parametrize(
    ("question", "options"),
    [
        ("Where?\nA. aw\nB. by", {"A": "aw", "B": "by"}),
        ("Where?\n(A) at the left \n (B) at the right\nAnswer.", {"A": "at the left", "B": "at the right"}),
        ("Where?\nA) x\nB) y\nC) z", {"A": "x", "B": "y", "C": "z"}),
        ("Where?\nA: x\nB: y", {"A": "x", "B": "y"}),
        ("A. Smith walks in. Where to?", None),  # one line is no list
        ("Where?\nB. x\nC. y", None),
        ("Where?\nA. x\nC. y", None),
        ("Where?\nA. x\nB. y\nA. z", None),
        ("A cat and\nB dog", None),
        ("Where? A. x B. y", None),  # not lines
    ],
)
def test_listed_options(question, options):
    assert listed_options(question) == options


@pytest.mark.parametrize("answer", ["B", "(B)", "by", "B. by", "By."])
def test_letter_and_text_of_a_listed_option_both_count(tmp_path, clip_file, answer):
    (prompt,) = load_prompts(write(tmp_path / "a.json", [asked("Where?\nA. aw\nB. by", clip_file, answer)]))
    assert (prompt.kind, prompt.options, prompt.ground_truth) == ("choice", {"A": "aw", "B": "by"}, answer)
    for response in ("<answer>B</answer>", "<answer>by</answer>"):
        assert option_letter(response, prompt.options) == option_letter(prompt.ground_truth, prompt.options) == "B"


@pytest.mark.parametrize("ending", ["json", "jsonl", "parquet"])
def test_formats_and_a_mix_of_files(tmp_path, clip_file, ending):
    files = [
        write(tmp_path / f"a.{ending}", [twiff(clip_file)]),
        write(tmp_path / f"b.{ending}", [bench(clip_file)]),
        write(
            tmp_path / f"c.{ending}",
            [
                {"id": "p", "question": "Q?", "answer": "yes"},
                {"id": "q", "question": "R?", "answer": "A", "options": {"A": "x", "B": "y"}},
            ],
        ),
    ]
    prompts = load_prompts(files, video_root=clip_file.parent)
    assert [p.source for p in prompts] == ["twiff", "futurebench/hop3", "plain/c", "plain/c"]
    assert [p.options is None for p in prompts] == [True, False, True, False]
    assert prompts.bad == []


def test_the_world_is_read_whole(world):
    prompts = load_prompts([world.sft, world.futurebench], world.videos)
    assert len(prompts) == 32
    assert {p.kind for p in prompts} == {"choice"}
    items = json.loads(world.futurebench.read_text())
    assert [p.ground_truth for p in prompts[16:]] == [item["qa"]["Answer"] for item in items]
    records = load_records(world.sft, world.videos)
    assert [(p.id, p.video, p.question, list(p.frames.numbers), p.ground_truth) for p in prompts[:16]] == [
        (r.id, r.video, r.question, r.image, r.answer) for r in records
    ]
    assert load_prompts([world.sft, world.futurebench], world.videos, limit=20) == prompts[:20]


def test_video_roots(tmp_path, clip_file):
    there, here = tmp_path / "there", tmp_path / "here"
    for folder in (there, here):
        folder.mkdir()
        (folder / "clip.mp4").write_bytes(clip_file.read_bytes())
    a = write(here / "a.json", [twiff(clip_file, video="clip.mp4")])
    b = write(here / "b.json", [bench(clip_file)])
    plain = write(here / "c.json", [{"question": "Q?", "answer": "yes"}])
    beside = load_prompts([a, b, plain])
    assert [p.video for p in beside] == [str(here / "clip.mp4")] * 2 + [None]
    mapped = load_prompts([a, b, plain], {str(a): str(there), str(b): str(here)})  # plain files need none
    assert [p.video for p in mapped] == [str(there / "clip.mp4"), str(here / "clip.mp4"), None]
    other_spelling = {str(here / ".." / "here" / "a.json"): str(there), str(b): str(here)}
    assert load_prompts([a, b, plain], other_spelling) == mapped
    with pytest.raises(ConfigError, match=r"video_root: .*b.json is not in it; it has folders for .*a.json. Add"):
        load_prompts([a, b], {str(a): str(there)})


def test_prompts_survive_json(tmp_path, clip_file):
    files = [write(tmp_path / "a.json", [twiff(clip_file)]), write(tmp_path / "b.json", [bench(clip_file)])]
    for prompt in load_prompts(files, clip_file.parent):
        assert RlPrompt.from_dict(json.loads(json.dumps(prompt.to_dict()))) == prompt
    with pytest.raises(DataError, match=r"expected a prompt with the fields id, .*; found id"):
        RlPrompt.from_dict({"id": "x"})


# ---- what is refused ------------------------------------------------------------------------------------------------


def change(row, **qa):
    return {**row, "qa": {**row["qa"], **qa}}


BENCH_FAULTS = [
    (lambda row: {**row, "question_type": "hop4"}, "question_type: expected one of hop1, hop2, hop3, hop5"),
    (lambda row: {k: v for k, v in row.items() if k != "question_type"}, "lacks question_type"),
    (lambda row: {**row, "video_path": 3}, "video_path: expected text, found 3"),
    (lambda row: {**row, "qa": "Where?"}, "qa: expected an object"),
    (lambda row: change(row, Question=" "), "qa.Question: expected text"),
    (lambda row: change(row, Options={"A": "x", "B": "y"}), r"qa.Options: expected the options A, B, C, D, found \["),
    (lambda row: change(row, Options=["x"] * 4), "qa.Options: expected the options"),
    (lambda row: change(row, Answer="E"), "qa.Answer: expected one of A, B, C, D, found 'E'"),
    (lambda row: change(row, Answer="by"), "qa.Answer: expected one of A, B, C, D, found 'by'"),
]


@pytest.fixture(scope="module")
def task_utils():
    """lmms_tasks/futurebench/utils.py, loaded as lmms-eval loads it."""
    spec = importlib.util.spec_from_file_location("futurebench_utils", lmms_tasks_dir() / "futurebench" / "utils.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("damage", "message"), BENCH_FAULTS)
def test_faulty_futurebench_items(tmp_path, clip_file, damage, message):
    row = damage(bench(clip_file, id="bad-one"))
    path = write(tmp_path / "b.json", [bench(clip_file), row])
    with pytest.raises(DataError, match=rf"1 of 2 prompts are bad.*other 1(.|\n)*b.json:2 \(id bad-one\): {message}"):
        load_prompts(path, clip_file.parent)
    with pytest.raises(DataError, match=rf"1 of 2 items are faulty.*\n  b.json:2 \(id bad-one\): {message}"):
        load_items(path)  # what evaluation reads with


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "", "answer": "x"}, "question: expected text"),
        ({"question": "Q?", "answer": " "}, "answer: expected text or a number"),
        ({"question": "Q?", "answer": True}, "answer: expected text or a number, found True"),
        ({"question": "Q?", "answer": "x", "images": "one.png"}, "images: expected a list of paths"),
        ({"question": "Q?", "answer": "x", "images": [1]}, "images: expected a list of paths"),
        ({"question": "Q?", "answer": "x", "image": ["one.png"]}, "unknown field `image`. Did you mean `images`"),
        ({"question": "Q?", "answer": "A", "option": ["x", "y"]}, "unknown field `option`. Did you mean `options`"),
        ({"question": "<image>?", "answer": "x"}, "the question has 1 `<image>` and `images` has 0 paths"),
        ({"question": "<image>?", "answer": "x", "images": ["one.png"] * 2}, "has 1 `<image>` and `images` has 2"),
        ({"question": "Q?", "answer": "x", "images": ["gone.png"]}, "gone.png: no such picture"),
        ({"question": "Q?", "answer": "x", "images": ["mine.json"]}, "mine.json: cannot be read as an image"),
        ({"question": "Q?", "answer": "x", "kind": "essay"}, "kind: expected one of choice, maths, text"),
        ({"question": "Q?", "answer": "A", "kind": "choice"}, "kind is choice, and there are no options"),
        ({"question": "Q?", "answer": "A", "kind": "text", "options": ["a", "b"]}, "kind is text, and there are"),
        ({"question": "Q?", "answer": "A", "options": ["a"]}, "options: expected two or more"),
        ({"question": "Q?", "answer": "A", "options": {"A": "a", "C": "c"}}, "options: expected two or more"),
        ({"question": "Q?", "answer": "C", "options": ["a", "b"]}, "the answer 'C' is none of the options"),
        ({"question": "Q?\nA. x\nB. y", "answer": "A", "options": ["x", "z"]}, "`options` .* differ from those"),
        ({"question": "Q?\nA. x\nB. y", "answer": "z"}, "the answer 'z' is none of the options"),
        ({"question": "Q <|image_pad|>?", "answer": "x"}, r"the question spells <\|image_pad\|>"),
        ({"question": "Q?", "answer": "x<|im_end|>"}, r"the answer spells <\|im_end\|>"),
        (
            {"question": "Q?", "answer": "x", "video": "clip.mp4"},
            "fields of the twiff schema, its file began with plain",
        ),
        ("Q?", "a row is an object with named fields, found str"),
    ],
)
def test_faulty_plain_rows(pictures, row, message):
    path = write(pictures / "mine.json", [{"question": "Q?", "answer": "yes"}, row])
    with pytest.raises(DataError, match=rf"mine.json:2 \(id .*\): .*{message}"):
        load_prompts(path)
    kept = load_prompts(path, on_bad="skip")
    assert ([p.id for p in kept], len(kept.bad)) == (["mine.json:1"], 1)


def test_faulty_twiff_rows(tmp_path, clip_file):
    (tmp_path / "cut.mp4").write_bytes(clip_file.read_bytes()[:500])
    bad = [
        (twiff(clip_file, image=[1]), "2 `<image>` and `image` has 1"),
        (twiff(clip_file, conversations=[{"from": "human", "value": "What?"}], image=[1]), "no gpt turn"),
        (asked("Where? <|vision_start|>", clip_file), r"the question spells <\|vision_start\|>"),
        (twiff(clip_file, answer="it <|latent|>"), r"the answer spells <\|latent\|>"),
        (asked("Where?\nA. aw\nB. by", clip_file, "cz"), "the answer 'cz' is none of the options"),
        (twiff(clip_file, video=str(tmp_path / "gone.mp4")), "gone.mp4: no such video"),
        (twiff(clip_file, video=str(tmp_path / "cut.mp4")), "cut.mp4: the file is cut off"),
        (bench(clip_file), "fields of the futurebench schema, its file began with twiff"),
    ]
    no_frame = twiff(
        clip_file, image=[], conversations=[{"from": "human", "value": "What?"}, {"from": "gpt", "value": "<image>"}]
    )
    bad.append((no_frame, r"the question shows no frame \(`image` is empty\)"))
    rows = [twiff(clip_file)] + [{**row, "id": f"bad-{i}"} for i, (row, _) in enumerate(bad)]
    path = write(tmp_path / "a.json", rows)
    with pytest.raises(DataError) as caught:
        load_prompts(path)
    assert str(caught.value).startswith(
        "9 of 10 prompts are bad. Fix them, or go on with the other 1 by `on_bad: skip`"
    )
    kept = load_prompts(path, on_bad="skip")
    assert [p.id for p in kept] == ["t1"]
    assert [item.id for item in kept.bad] == [f"bad-{i}" for i in range(9)]
    for item, (_, message) in zip(kept.bad, bad, strict=True):
        assert re.search(message, item.reason), (message, item.reason)


def test_questions_may_spell_latent_markers_and_headers(tmp_path, clip_file):
    row = asked("Think in <|latent_start|>.\n<|im_start|>assistant\nWhere?", clip_file)
    assert len(load_prompts(write(tmp_path / "a.json", [row]))) == 1  # as in SFT


def test_ids_are_unique_over_files(tmp_path, clip_file):
    a = write(tmp_path / "a.json", [twiff(clip_file, id="x"), twiff(clip_file, id="y")])
    b = write(tmp_path / "b.jsonl", [bench(clip_file, id="z"), bench(clip_file, id="x")])
    with pytest.raises(DataError, match=r"1 of 4 prompts(.|\n)*b.jsonl:2 \(id x\): the id is taken by .*a.json:1"):
        load_prompts([a, b], clip_file.parent)
    kept = load_prompts([a, b], clip_file.parent, on_bad="skip")
    assert [p.id for p in kept] == ["x", "y", "z"]


def test_a_long_list_of_bad_rows_is_counted(tmp_path, clip_file):
    path = write(tmp_path / "b.json", [bench(clip_file, id=f"q{i:02d}", question_type="x") for i in range(13)])
    for on_bad in ("raise", "skip"):  # nothing would be left
        with pytest.raises(DataError, match=r"13 of 13 prompts are bad\. Fix them") as caught:
            load_prompts(path, clip_file.parent, on_bad=on_bad)
        assert [f"(id q{i:02d})" in str(caught.value) for i in range(13)] == [True] * 10 + [False] * 3
        assert "and 3 more" in str(caught.value)


def test_a_file_without_a_good_prompt_stops_skipping_too(tmp_path, clip_file):
    """A wrong root of one file would otherwise leave that file out without a word."""
    a = write(tmp_path / "a.json", [twiff(clip_file)])
    b = write(tmp_path / "b.json", [bench(clip_file)])
    with pytest.raises(DataError, match=r"b.json: 1 of 1 prompts are bad(.|\n)*no such video"):
        load_prompts([a, b], {str(a): "/", str(b): str(tmp_path)}, on_bad="skip")


def test_bad_files(tmp_path):
    with pytest.raises(DataError, match="no such file of prompts"):
        load_prompts(tmp_path / "gone.json")
    (tmp_path / "x.csv").write_text("a,b")
    with pytest.raises(DataError, match=r"expected a name that ends in \.json, \.jsonl, \.parquet"):
        load_prompts(tmp_path / "x.csv")
    with pytest.raises(DataError, match="holds no row"):
        load_prompts(write(tmp_path / "empty.json", []))
    rows = [{"prompt": "Q?", "answer": "x"}, {"label": 3}]
    with pytest.raises(DataError, match=r"of no known schema. Expected .*video_path.*; found prompt, answer, label\."):
        load_prompts(write(tmp_path / "other.json", rows))
    with pytest.raises(DataError, match="found no row with named fields"):
        load_prompts(write(tmp_path / "words.json", ["a", "b"]))
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"question": "Q?", "answer": "x"}\n{"question": \n')
    with pytest.raises(DataError, match=r"lines.jsonl:2 \(id -\): not JSON"):
        load_prompts(lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"question_media": "gif"}, "question_media: expected images or video, found 'gif'"),
        ({"on_bad": "warn"}, "on_bad: expected raise or skip, found 'warn'"),
        ({"num_frames": 0}, "num_frames: expected a whole number, at least 1, found 0"),
        ({"limit": 0}, "limit: expected at least 1"),
        ({"files": []}, "no file of prompts is given"),
    ],
)
def test_bad_arguments(world, arguments, message):
    with pytest.raises(ConfigError, match=message):
        load_prompts(**{"files": world.sft, "video_root": world.videos, **arguments})


# ---- the same in SFT, RL and evaluation -----------------------------------------------------------------------------


def same(mine, theirs):
    """Equal keys, shapes, types and values."""
    assert set(mine) == set(theirs)
    for name in mine:
        assert mine[name].dtype == theirs[name].dtype
        assert torch.equal(mine[name], theirs[name]), name


@pytest.mark.parametrize("media", ["images", "video"])
def test_rl_shows_what_sft_shows(world, processor, tiny_path, media):
    from transformers import AutoConfig

    latent = LatentConfig.from_hf(AutoConfig.from_pretrained(tiny_path))
    collate = SftCollator(processor, latent, question_media=media)
    dataset = SftDataset(list(load_records(world.sft, world.videos)))
    prompts = load_prompts(world.sft, world.videos, question_media=media)
    for i, prompt in enumerate(prompts):
        batch, encoded = collate([dataset[i]]), encode_prompt(prompt, processor)
        start = int(batch["response_start"][0])
        assert encoded.prompt_ids == batch["input_ids"][0, :start].tolist()
        batch["mm_token_type_ids"] = batch["mm_token_type_ids"][:, :start]
        same(encoded.media, {name: batch[name] for name in batch if name in encoded.media})
        pixels = {"images": "pixel_values", "video": "pixel_values_videos"}[media]
        assert pixels in encoded.media
        assert encoded.inputs["mm_token_type_ids"].shape == (1, start)


@pytest.fixture
def task(world, monkeypatch, tmp_path):
    """The futurebench task as lmms-eval builds it for the model future_l1."""
    import datasets
    from lmms_eval.tasks import TaskManager, get_task_dict

    monkeypatch.setenv("FUTUREBENCH_DATA", str(world.futurebench))
    monkeypatch.setenv("FUTUREBENCH_VIDEO_DIR", str(world.videos))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    manager = TaskManager(include_path=str(lmms_tasks_dir()), include_defaults=False, model_name="future_l1")
    return get_task_dict(["futurebench"], manager, task_type="chat")["futurebench"]


def test_rl_shows_what_the_evaluation_shows(world, processor, task):
    prompts = load_prompts(world.futurebench, world.videos, num_frames=32)
    docs = list(task.dataset["test"])
    assert len(docs) == len(prompts) == 16
    build = InputBuilder(processor, Evenly(32))
    for doc, prompt in zip(docs, prompts, strict=True):
        assert prompt.id == doc["id"]
        assert prompt.question == task.doc_to_text(doc)
        assert prompt.ground_truth == task.doc_to_target(doc)
        assert [prompt.video] == task.doc_to_visual(doc)
        theirs = build(task.doc_to_messages(doc))
        encoded = encode_prompt(prompt, processor)
        assert encoded.prompt_ids == theirs.pop("input_ids")[0].tolist()
        theirs.pop("attention_mask")
        same(encoded.media, theirs)
        assert encoded.inputs["pixel_values_videos"].shape[0] == int(encoded.inputs["video_grid_thw"].prod())


@pytest.mark.parametrize("count", [3, 4, 7, 32])
def test_fewer_frames_than_the_clip_has(tmp_path, clip_file, processor, count):
    """The sampling itself, and an odd number of frames, as in the evaluation."""
    path = write(tmp_path / "b.json", [bench(clip_file)])
    (prompt,) = load_prompts(path, clip_file.parent, num_frames=count)
    content = [{"type": "video", "url": str(clip_file)}, {"type": "text", "text": prompt.question}]
    theirs = InputBuilder(processor, Evenly(count))([{"role": "user", "content": content}])
    encoded = encode_prompt(prompt, processor)
    assert encoded.prompt_ids == theirs.pop("input_ids")[0].tolist()
    theirs.pop("attention_mask")
    same(encoded.media, theirs)
    assert encoded.inputs["video_grid_thw"][0, 0] == -(-min(count, 10) // 2)


def test_pictures_as_the_evaluation_shows_them(pictures, processor):
    Image.open(pictures / "one.png").convert("RGBA").save(pictures / "clear.png")
    row = {"question": "Alike?", "answer": "no", "images": ["clear.png", "two.png"]}
    (prompt,) = load_prompts(write(pictures / "mine.json", [row]))
    content = [{"type": "image", "url": path} for path in prompt.images] + [{"type": "text", "text": "Alike?"}]
    theirs = InputBuilder(processor, Evenly(1))([{"role": "user", "content": content}])
    encoded = encode_prompt(prompt, processor)
    assert encoded.prompt_ids == theirs.pop("input_ids")[0].tolist()
    theirs.pop("attention_mask")
    same(encoded.media, theirs)
    assert encoded.inputs["image_grid_thw"].shape == (2, 3)


def test_sft_and_evaluation_of_one_scene_agree_in_rl(tmp_path, processor):
    """The same scene as a TwiFF row of the whole clip and as a FutureBench item: the same ids and grids."""
    from future_l1_plugin.data.world_questions import sft_record

    question = draw_question(random.Random(5), "hop2")
    write_video(tmp_path / "whole.mp4", clip(question.scene), fps=0.5)
    write_video(tmp_path / "seen.mp4", seen_clip(question.scene, question.ask), fps=1.0)
    files = [
        write(tmp_path / "a.json", [sft_record(question, "a", "whole.mp4")]),
        write(tmp_path / "b.json", [futurebench_item(question, "b", "seen.mp4")]),
    ]
    train, test = (encode_prompt(p, processor) for p in load_prompts(files, question_media="video"))
    assert train.prompt_ids == test.prompt_ids
    pixels = "pixel_values_videos"
    assert (train.inputs[pixels] - test.inputs[pixels]).abs().mean() < 0.02  # two files, encoded apart


def test_text_alone(tmp_path, processor):
    (prompt,) = load_prompts(write(tmp_path / "p.json", [{"question": "What is 6 times 7?", "answer": 42}]))
    encoded = encode_prompt(prompt, processor)
    assert processor.decode(encoded.prompt_ids) == (
        "<|im_start|>user\nWhat is 6 times 7?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert not any("pixel" in name or "grid" in name for name in encoded.media)


def test_the_cache_changes_nothing_and_is_used(world, processor):
    prompts = load_prompts([world.sft, world.futurebench], world.videos, limit=17)
    cache = FrameCache(2**24)
    for prompt in (prompts[0], prompts[16]):
        once, again = encode_prompt(prompt, processor, cache), encode_prompt(prompt, processor, cache)
        plain = encode_prompt(prompt, processor)
        assert once.prompt_ids == again.prompt_ids == plain.prompt_ids
        same(once.inputs, plain.inputs)
        same(again.inputs, plain.inputs)
    assert (cache.hits, cache.misses) == (2, 2)


def test_media_that_cannot_be_read_name_the_prompt(tmp_path, clip_file, pictures, processor, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as lmms-eval does, for its whole process
    (prompt,) = load_prompts(write(tmp_path / "a.json", [twiff(clip_file)]))
    gone = dataclasses.replace(prompt, video=str(tmp_path / "gone.mp4"))
    with pytest.raises(DataError, match=r"prompt t1: .*gone.mp4: no such video"):
        encode_prompt(gone, processor)
    Image.new("RGB", (2000, 4)).save(pictures / "flat.png")
    row = {"id": "flat", "question": "Q?", "answer": "x", "images": ["flat.png"]}
    (flat,) = load_prompts(write(pictures / "mine.json", [row]))
    with pytest.raises(DataError, match="prompt flat: the processor refuses"):
        encode_prompt(flat, processor)
    broken = (pictures / "one.png").read_bytes()[:2000]
    (pictures / "flat.png").write_bytes(broken)  # its header is good
    with pytest.raises(DataError, match=r"prompt flat: .*flat.png: expected a whole picture: "):
        encode_prompt(flat, processor)


def test_videos_lie_beside_the_file_unless_said_otherwise(tmp_path):
    make_world(tmp_path / "world", test=1, train=0, perception=0, seed=0)
    prompt, *_ = load_prompts(tmp_path / "world" / "futurebench.json")
    assert prompt.video.startswith(str(tmp_path / "world" / "videos" / "test"))
