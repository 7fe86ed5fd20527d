"""The three spellings, every way a record can be bad, and files with bad rows among good ones."""

import dataclasses
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from future_l1_plugin.data.record_files import BadRecord, load_records
from future_l1_plugin.data.records import CONTROL_TOKENS, BadRecordError, Frame, Text, TwiffRecord, text_fault
from future_l1_plugin.errors import ConfigError, DataError


def row(**changes):
    """A Future-L1-50K row; a change to None takes the field out."""
    base = {
        "id": "clip-1",
        "conversations": [
            {"from": "human", "value": "frame_1\n<image>\nframe_3\n<image>\nWhere does the ball land?"},
            {"from": "gpt", "value": "THOUGHT 1: It falls.\n<image>\nTHOUGHT 2: It bounces.\n<image>\n"},
        ],
        "video": "test/clip.mp4",
        "image": [1, 3],
        "reasoning_image": [5, 8],
        "answer": "B",
        "gain": 4,
        "meta_data": {"classification": "sport", "start": 0.5},
    }
    base.update(changes)
    return {key: value for key, value in base.items() if value is not None}


def turns(human="Q? <image><image>", gpt="a<image>b<image>"):
    return [{"from": "human", "value": human}, {"from": "gpt", "value": gpt}]


EXPECTED = TwiffRecord(
    id="clip-1",
    video="test/clip.mp4",
    question="frame_1\n<image>\nframe_3\n<image>\nWhere does the ball land?",
    image=[1, 3],
    reasoning=(Text("It falls."), Frame(5), Text("It bounces."), Frame(8)),
    answer="B",
    extras={"gain": 4, "meta_data": {"classification": "sport", "start": 0.5}},
)

# Spellings ----------------------------------------------------------------------------------------------------------


def test_future_l1_row():
    record = TwiffRecord.from_dict(row())
    assert record == EXPECTED
    assert record.reasoning_image == [5, 8]


def test_raw_twiff_row():
    record = TwiffRecord.from_dict(
        {
            "id": "clip-1",
            "video": "test/clip.mp4",
            "question": EXPECTED.question,
            "answer": "THOUGHT 1: It falls.\n<rimage>\nTHOUGHT 2: It bounces.<rimage>\n<ans>B</ans>",
            "question_images_index": [1, 3],
            "reasoning_images_index": [5, 8],
            "gain": 4,
            "meta_data": {"classification": "sport", "start": 0.5},
        }
    )
    assert record == EXPECTED


def test_interleave_row():
    conversations = turns(EXPECTED.question, "It falls.<rimage>It bounces.<rimage><ans>B</ans>")
    changed = row(conversations=conversations, image=None, reasoning_image=None, answer=None, frames=[1, 3])
    assert TwiffRecord.from_dict({**changed, "recon_frames": [5, 8]}) == EXPECTED


def test_conversations_as_two_columns():
    first, second = row()["conversations"]
    columns = {"from": ["human", "gpt"], "value": [first["value"], second["value"]]}
    assert TwiffRecord.from_dict(row(conversations=columns)) == EXPECTED


def test_a_question_without_placeholders_gets_its_frames_in_front():
    record = TwiffRecord.from_dict(row(conversations=turns(human="Where does it land?")))
    assert record.question == "<image>\n<image>\nWhere does it land?"


def test_text_only_reasoning():
    record = TwiffRecord.from_dict(row(conversations=turns(gpt="THOUGHT 1: It falls."), reasoning_image=None))
    assert record.reasoning == (Text("It falls."),)
    assert record.reasoning_image == []


def test_thoughts_are_unnumbered_wherever_they_stand():
    record = TwiffRecord.from_dict(row(conversations=turns(gpt="<image>THOUGHT 1: a. THOUGHT 12:b<image>")))
    assert record.reasoning == (Frame(5), Text("a. b"), Frame(8))


@pytest.mark.parametrize(
    ("answer", "response", "expected"),
    [
        ("B", "a<image>b<image>", "B"),
        (" B ", "a<image>b<image>", "B"),
        (None, "a<image>b<image><answer>C</answer>", "C"),
        (None, "a<image>b<image><ans>\nC\n</ans>", "C"),
        (None, "<answer>A</answer>a<image>b<image><answer>C</answer>", "C"),
        ("B", "a<image>b<image><answer>C</answer>", "B"),
        ("<answer>B</answer>", "a<image>b<image>", "B"),
    ],
)
def test_answer(answer, response, expected):
    record = TwiffRecord.from_dict(row(answer=answer, conversations=turns(gpt=response)))
    assert record.answer == expected
    assert record.reasoning == (Text("a"), Frame(5), Text("b"), Frame(8))


def test_video_root():
    assert TwiffRecord.from_dict(row(), video_root="videos").video == "videos/test/clip.mp4"
    assert TwiffRecord.from_dict(row(video="/elsewhere/clip.mp4"), video_root="videos").video == "/elsewhere/clip.mp4"


def test_an_absent_id_is_the_place():
    assert TwiffRecord.from_dict(row(id=None), source="some/rows.jsonl:7").id == "rows.jsonl:7"
    assert TwiffRecord.from_dict(row(id=None), source="some/rows.jsonl:7", unnamed="some/7").id == "some/7"
    assert TwiffRecord.from_dict(row(id=0), unnamed="some/7").id == "0"


def test_parquet_nulls_are_absent_fields():
    record = TwiffRecord.from_dict({**row(), "question": None, "cot": None})
    assert record == EXPECTED


# Round trip ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "record",
    [
        EXPECTED,
        dataclasses.replace(EXPECTED, reasoning=(Frame(2), Frame(2), Text("then\ntwo lines"))),
        dataclasses.replace(EXPECTED, reasoning=(), image=[], question="What next?"),
    ],
)
def test_round_trip(record):
    again = TwiffRecord.from_dict(json.loads(json.dumps(record.to_dict())))
    assert again == record
    assert again.to_dict() == record.to_dict()


def test_round_trip_relative_to_the_video_root():
    record = TwiffRecord.from_dict(row(), video_root="videos")
    assert record.to_dict(video_root="videos")["video"] == "test/clip.mp4"
    assert record.to_dict()["video"] == "videos/test/clip.mp4"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"reasoning": (Text("one"), Text("two"))}, "reasoning"),
        ({"reasoning": (Text("THOUGHT 1: one"),)}, "reasoning"),
        ({"question": "no frames named"}, "question"),
        ({"extras": {"answer": "C"}}, "answer"),
    ],
)
def test_what_cannot_be_read_back_is_not_written(changes, field):
    with pytest.raises(DataError, match=f"clip-1.*`{field}`"):
        dataclasses.replace(EXPECTED, **changes).to_dict()


# Bad records --------------------------------------------------------------------------------------------------------

BAD = {
    "no human turn": (row(conversations=turns()[1:]), "no human turn"),
    "no gpt turn": (row(conversations=turns()[:1]), "no gpt turn"),
    "no turns": (row(conversations=[]), "no human turn"),
    "nothing to read": (row(conversations=None), "no human turn"),
    "raw without answer": (row(conversations=None, question="Q", answer=None), "no gpt turn"),
    "two questions": (row(conversations=[*turns(), *turns()]), "2 human turns"),
    "unknown speaker": (row(conversations=[{"from": "dog", "value": "woof"}]), "'dog'"),
    "turn without text": (row(conversations=[{"from": "human"}]), "no text"),
    "turns of another kind": (row(conversations="hello"), "expected a list"),
    "uneven columns": (row(conversations={"from": ["human"], "value": []}), "1 roles and 0 texts"),
    "frame 0": (row(image=[0, 3]), "`image` holds 0.*1..8"),
    "frame 9": (row(reasoning_image=[5, 9]), "`reasoning_image` holds 9.*1..8"),
    "frame by name": (row(image=["1", 3]), "`image` holds '1'"),
    "frame by half": (row(image=[1.5, 3]), "`image` holds 1.5"),
    "frame by yes": (row(image=[True, 3]), "`image` holds True"),
    "one frame for a list": (row(image=1), "expected a list"),
    "frames twice": (row(frames=[1, 3]), "`image` and `frames`"),
    "more placeholders than frames": (row(image=[1]), "2 `<image>`.*1 frames"),
    "more frames than placeholders": (row(image=[1, 2, 3]), "2 `<image>`.*3 frames"),
    "future frame without place": (row(reasoning_image=[5, 6, 7]), "2 image placeholders.*3 frames"),
    "place without future frame": (row(reasoning_image=None), "2 image placeholders.*0 frames"),
    "empty question": (row(conversations=turns(human="<image>\n<image>\n")), "question is empty"),
    "no answer": (row(answer=None), "answer is empty"),
    "blank answer": (row(answer="  "), "answer is empty"),
    "empty tags": (row(answer="<answer> </answer>"), "answer is empty"),
    "unclosed tags": (row(answer=None, conversations=turns(gpt="a<image>b<image><answer>C")), "answer is empty"),
    "answer as number": (row(answer=3), "expected text"),
    "no video": (row(video=None), "`video` is missing"),
    "blank video": (row(video=" "), "`video` is missing"),
}


@pytest.mark.parametrize(("bad", "says"), BAD.values(), ids=BAD)
def test_bad_records_name_source_id_and_fix(bad, says):
    with pytest.raises(DataError, match=says) as error:
        TwiffRecord.from_dict(bad, source="rows.jsonl:7")
    assert str(error.value).startswith("rows.jsonl:7 (id clip-1): ")
    assert str(error.value).endswith(".")


def test_a_row_that_is_no_object():
    with pytest.raises(DataError, match="found list"):
        TwiffRecord.from_dict([1, 2], source="rows.json:1")


@pytest.mark.parametrize(
    ("kind", "names"),
    {
        "turns": ["no human turn", "nothing to read", "raw without answer", "two questions", "uneven columns"],
        "frames": ["frame 0", "one frame for a list", "frames twice", "place without future frame"],
        "answer": ["blank answer", "answer as number"],
        "record": ["no video", "empty question"],
    }.items(),
)
def test_faults_are_sorted(kind, names):
    for name in names:
        with pytest.raises(BadRecordError) as error:
            TwiffRecord.from_dict(BAD[name][0])
        assert error.value.kind == kind, name


def test_the_latent_tokens_are_control_tokens():
    from future_l1_plugin.latent.tokens import TOKENS

    assert [token for token in CONTROL_TOKENS if "latent" in token] == list(TOKENS)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({}, None),
        ({"answer": "B <|latent|>"}, "the answer spells <|latent|>"),
        ({"reasoning": (Text("<|im_end|>"),)}, "a thought spells <|im_end|>"),
        ({"question": "<|image_pad|>?"}, "the question spells <|image_pad|>"),
        ({"question": "What is <|latent|>?"}, None),  # looked for in the response only
    ],
)
def test_words_that_are_control_tokens(changes, fault):
    found = text_fault(dataclasses.replace(EXPECTED, **changes))
    assert found is None if fault is None else found.startswith(fault)


# Files --------------------------------------------------------------------------------------------------------------


def write_rows(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.parquet"])
def test_every_format_reads_the_same(tmp_path, name):
    path = write_rows(tmp_path / name, [row(), row(id="clip-2"), row(id=None)])
    records = load_records(path, video_root="")
    assert [record.id for record in records] == ["clip-1", "clip-2", f"{name}:3"]
    assert records[0] == EXPECTED
    assert (len(records), records.bad) == (3, [])


def test_parquet_leaves_embedded_pictures_out(tmp_path):
    path = write_rows(tmp_path / "rows.parquet", [{**row(), "question_images": [b"jpeg"]}])
    assert load_records(path, video_root="")[0] == EXPECTED


def test_json_with_a_data_list(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps({"data": [row()]}))
    assert len(load_records(tmp_path / "rows.json")) == 1


def test_videos_lie_beside_the_file_unless_told(tmp_path):
    path = write_rows(tmp_path / "rows.json", [row()])
    assert load_records(path)[0].video == str(tmp_path / "test/clip.mp4")
    assert load_records(path, video_root="videos")[0].video == "videos/test/clip.mp4"


def spoiled_jsonl(tmp_path):
    lines = [json.dumps(row(id=f"clip-{n}")) for n in range(5)]
    lines[1] = lines[1][: len(lines[1]) // 2]  # cut in half
    lines[2] = json.dumps(row(id="clip-2", image=[1, 9]))
    lines[4] = json.dumps(row(id="clip-0"))
    (tmp_path / "rows.jsonl").write_text("\n".join([*lines[:3], "", *lines[3:]]))
    return tmp_path / "rows.jsonl"


def test_skip_counts_lists_and_goes_on(tmp_path):
    path = spoiled_jsonl(tmp_path)
    records = load_records(path, on_bad="skip")
    assert [record.id for record in records] == ["clip-0", "clip-3"]
    assert [(bad.source, bad.id) for bad in records.bad] == [
        (f"{path}:2", "-"),
        (f"{path}:3", "clip-2"),
        (f"{path}:6", "clip-0"),  # line 4 is blank
    ]
    assert "not JSON" in records.bad[0].reason
    assert "`image` holds 9" in records.bad[1].reason
    assert f"taken by {path}:1" in records.bad[2].reason
    assert isinstance(records.bad[0], BadRecord)


def test_raise_reads_to_the_end_first(tmp_path):
    path = spoiled_jsonl(tmp_path)
    with pytest.raises(DataError) as error:
        load_records(path)
    message = str(error.value)
    assert message.startswith(f"{path}: 3 of 5 records are bad.")
    assert "on_bad: skip" in message
    assert all(f"{path}:{line} " in message for line in (2, 3, 6))


def test_a_long_list_of_bad_records_is_cut(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [row(), *[row(id=f"bad-{n}", answer="") for n in range(1234)]])
    with pytest.raises(DataError, match=r"1,234 of 1,235 records are bad[\s\S]*and 1,224 more$") as error:
        load_records(path)
    assert str(error.value).count("answer is empty") == 10


def test_nothing_good_is_an_error_even_when_skipping(tmp_path):
    with pytest.raises(DataError, match="2 of 2 records are bad"):
        load_records(write_rows(tmp_path / "rows.jsonl", [row(answer="")] * 2), on_bad="skip")


def test_a_line_of_wrong_characters_spoils_only_itself(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b'{"id": "\xff"}\n' + json.dumps(row()).encode())
    records = load_records(tmp_path / "rows.jsonl", on_bad="skip")
    assert (len(records), len(records.bad)) == (1, 1)
    assert "UTF-8" in records.bad[0].reason


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("rows.json", b'[{"id": 1}, {"id"', "not a JSON file"),
        ("rows.json", b'"hello"', "expected a list"),
        ("rows.json", b"[]", "holds no record"),
        ("rows.jsonl", b"", "holds no record"),
        ("rows.parquet", b"no parquet at all", "not a readable parquet"),
        ("rows.csv", b"id,video", "format"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says) as error:
        load_records(tmp_path / name, on_bad="skip")
    assert str(error.value).startswith(str(tmp_path / name))


def test_a_folder_reads_as_its_files_with_ids_over_all_of_them(tmp_path):
    (tmp_path / "b").mkdir()
    write_rows(tmp_path / "b" / "rows.json", [row(id="clip-3"), row(id=None)])
    write_rows(tmp_path / "rows.json", [row(id="clip-4"), row(id=None)])
    write_rows(tmp_path / "a.jsonl", [row(), row(id="clip-2")])
    records = load_records(tmp_path)
    ids = ["clip-1", "clip-2", "clip-3", "b/rows.json:2", "clip-4", f"{tmp_path.name}/rows.json:2"]
    assert [record.id for record in records] == ids
    assert {record.video for record in records} == {str(tmp_path / "test/clip.mp4")}
    assert load_records(tmp_path, video_root="videos")[2].video == "videos/test/clip.mp4"
    write_rows(tmp_path / "c.parquet", [row(id="clip-2")])
    with pytest.raises(DataError, match=f"1 of 7 records(.|\n)*the id is taken by {tmp_path / 'a.jsonl'}:2"):
        load_records(tmp_path)


def test_a_dataset_of_the_hub_needs_a_video_root(tmp_path, monkeypatch):
    import huggingface_hub

    with pytest.raises(ConfigError, match="org/name:train: a dataset of the hub comes without clips"):
        load_records("org/name:train")
    write_rows(tmp_path / "train.jsonl", [row()])
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    assert load_records("org/name:train", video_root="videos")[0].video == "videos/test/clip.mp4"


def test_missing_file_and_unknown_policy(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        load_records(tmp_path / "rows.json")
    with pytest.raises(ConfigError, match="expected raise or skip"):
        load_records(tmp_path / "rows.json", on_bad="ignore")


def test_many_rows(tmp_path, capfd):
    path = write_rows(tmp_path / "rows.jsonl", [row(id=str(n)) for n in range(2_500)])
    assert len(load_records(path)) == 2_500
    assert capfd.readouterr().err == ""  # the bar is for terminals
