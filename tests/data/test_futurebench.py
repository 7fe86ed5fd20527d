"""FutureBench items: one reader, whoever asks."""

import importlib.util
import json

import pytest

from future_l1_plugin.data.futurebench import ANSWER_IN_TAGS, FutureBenchItem, load_items, multiple_choice_prompt
from future_l1_plugin.data.rl import load_prompts
from future_l1_plugin.data.sources import RowFault
from future_l1_plugin.errors import DataError
from future_l1_plugin.paths import lmms_tasks_dir

OPTIONS = {"A": "a1", "B": "b2", "C": "c3", "D": "d4"}


def item(name="q", **change):
    qa = {"Question": f"Where will {name} be?", "Options": OPTIONS, "Answer": "A"} | change.pop("qa", {})
    path = "V1-33K/video_dataset/clips/a.mp4"
    return {"id": name, "video_path": path, "question_type": "hop1", "qa": qa, **change}


def test_an_item_and_its_prompt():
    found = FutureBenchItem.from_dict(item("ball", id=7, qa={"Answer": " b "}, meta="not of the schema"))
    assert found.to_dict() == item("ball", id="7", qa={"Answer": "B"})
    question = "Where will ball be?\nA. a1\nB. b2\nC. c3\nD. d4"
    assert found.prompt() == f"{question}\nPut only the option letter within <answer></answer>."
    assert found.prompt("Look. ", " Now.") == f"Look. {question} Now."
    listed = "Where? A) a1 B) b2 C) c3 D) d4"
    assert multiple_choice_prompt(listed, OPTIONS, post=ANSWER_IN_TAGS) == listed + ANSWER_IN_TAGS


@pytest.mark.parametrize(
    "path",
    ["clips/a.mp4", "/clips/a.mp4", "V1-33K/video_dataset/clips/a.mp4", "video_dataset/x/video_dataset/clips/a.mp4"],
)
def test_where_a_video_lies(tmp_path, path):
    assert FutureBenchItem.from_dict(item(video_path=path)).video_file(tmp_path) == tmp_path / "clips" / "a.mp4"


@pytest.mark.parametrize(
    "change, fault",
    [
        ({"question_type": "hop4"}, "question_type: expected one of hop1, hop2, hop3, hop5, found 'hop4'"),
        ({"video_path": None}, "lacks video_path"),
        ({"id": ""}, "lacks id"),
        ({"video_path": 7}, "video_path: expected text, found 7"),
        ({"qa": {"Question": " "}}, "qa.Question: expected text, found ' '"),
        ({"qa": {"Options": {"A": "a1"}}}, r"qa.Options: .*found \['A'\]"),
        ({"qa": {"Options": OPTIONS | {"E": "e5"}}}, r"qa.Options: .*found \['A', 'B', 'C', 'D', 'E'\]"),
        ({"qa": {"Options": OPTIONS | {"D": None}}}, r"qa.Options: .*found \['A', 'B', 'C'\]"),
        ({"qa": {"Answer": "E"}}, "qa.Answer: expected one of A, B, C, D, found 'E'"),
        ({"qa": {"Answer": 1}}, "qa.Answer: .*found 1"),
    ],
)
def test_what_an_item_may_lack(change, fault):
    with pytest.raises(RowFault, match=fault):
        FutureBenchItem.from_dict(item(**change))
    with pytest.raises(RowFault, match="qa: expected an object with Question, Options and Answer, found str"):
        FutureBenchItem.from_dict(item() | {"qa": "Where?"})


ROWS = [item("one"), item("two", qa={"Options": OPTIONS | {"E": None}})]  # as a parquet column would have it
LINES = "\n".join(map(json.dumps, ROWS)) + "\n"


@pytest.fixture
def utils(tmp_path, monkeypatch):
    """The task's own module, as lmms-eval loads it, and videos for both readers."""
    (tmp_path / "videos" / "clips").mkdir(parents=True)
    (tmp_path / "videos" / "clips" / "a.mp4").write_bytes(CLIP)
    monkeypatch.setenv("FUTUREBENCH_VIDEO_DIR", str(tmp_path / "videos"))
    spec = importlib.util.spec_from_file_location("futurebench_utils", lmms_tasks_dir() / "futurebench" / "utils.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _clip() -> bytes:
    import io

    import av
    import numpy as np

    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=4)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for _ in range(8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


CLIP = _clip()


@pytest.mark.parametrize(
    "name, content",
    [
        ("list.json", json.dumps(ROWS)),
        ("data.json", json.dumps({"data": ROWS, "version": 1})),
        ("mark.json", "\ufeff" + json.dumps(ROWS, indent=2)),
        ("lines.json", LINES),
        ("lines.jsonl", "\ufeff" + LINES + "\n\n"),
        ("list.jsonl", json.dumps(ROWS)),
        ("long.jsonl", "\n" + json.dumps(ROWS, indent=2)),
    ],
)
def test_rl_and_evaluation_read_the_same_files(tmp_path, utils, monkeypatch, name, content):
    file = tmp_path / name
    file.write_text(content, encoding="utf-8")
    monkeypatch.setenv("FUTUREBENCH_DATA", str(file))
    items = load_items(file)
    assert [one.id for one in items] == ["one", "two"] and items[1].options == OPTIONS
    assert utils.read_docs() == (str(file), [one.to_dict() for one in items])
    prompts = load_prompts(file)
    assert [p.question for p in prompts] == [one.prompt() for one in items]
    assert [p.video for p in prompts] == [str(utils.video_file(doc)) for doc in utils.read_docs()[1]]


@pytest.mark.parametrize(
    "name, content, match",
    [
        ("rows.json", "[1, 2", "rows.json: not a JSON file"),
        ("rows.jsonl", "[1, 2", "rows.jsonl: not a JSON file"),
        ("rows.json", '"words"', "holds str, expected a list of records, or one on each line"),
        ("rows.json", "[]", "holds no "),
        ("rows.txt", LINES, "rows.txt: cannot tell its format"),
    ],
)
def test_rl_and_evaluation_refuse_the_same_files(tmp_path, name, content, match):
    (tmp_path / name).write_text(content)
    for read in (load_items, load_prompts):
        with pytest.raises(DataError, match=match):
            read(tmp_path / name)


def test_every_faulty_item_is_named_and_the_first_ten_are_shown(tmp_path):
    rows = [5, item("good"), {"id": "second"}, item("good"), *(item(f"x{i}", question_type="hop9") for i in range(20))]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    with pytest.raises(DataError) as error:
        load_items(tmp_path / "rows.json", source="org/set")
    first, *lines = str(error.value).splitlines()
    assert first == "org/set: 23 of 24 items are faulty. Fix or remove them."
    assert lines[0] == "  rows.json:1: a row is an object with named fields, found int. Write it again."
    assert lines[1] == "  rows.json:3 (id second): lacks video_path, question_type, qa. Add the field."
    assert lines[2] == "  rows.json:4 (id good): its id is also that of rows.json:2"
    assert lines[10] == "  and 13 more" and len(lines) == 11
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows[1]) + "\n{not json\n")
    with pytest.raises(DataError, match=r"1 of 2 items are faulty.*\n  rows.jsonl:2: not JSON \(.*column 2\)"):
        load_items(tmp_path / "rows.jsonl")
