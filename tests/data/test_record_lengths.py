"""Lengths of training records from headers, against what the collator makes of them; records that fail in a run."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import DataLoader

from future_l1_plugin.data import make_world
from future_l1_plugin.data.lengths import ClipHeader, clip_header
from future_l1_plugin.data.record_files import Records, load_records
from future_l1_plugin.data.record_lengths import RecordLengths, check_record_lengths
from future_l1_plugin.data.records import Frame, Text, TwiffRecord
from future_l1_plugin.data.sft import RecordFailed, SftCollator, SftDataset, SftSample
from future_l1_plugin.data.video_writer import write_video
from future_l1_plugin.errors import DataError
from future_l1_plugin.model import LatentConfig


@pytest.fixture(scope="module")
def parts(tiny_path):
    """(processor, latent configuration) of the tiny checkpoint."""
    from transformers import AutoConfig

    from future_l1_plugin.model.checkpoint import load_processor

    latent = LatentConfig.from_hf(AutoConfig.from_pretrained(tiny_path))
    return load_processor(tiny_path, latent), latent


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    world = make_world(tmp_path_factory.mktemp("world"), test=0, train=8, seed=0, progress=False)
    return load_records(world.sft, world.videos)


def encoded(parts, record, media, spans, latent=None) -> int:
    """Tokens of the record in a batch of its own."""
    collate = SftCollator(parts[0], latent or parts[1], media, spans)
    return collate([SftDataset([record], spans)[0]])["input_ids"].shape[1]


def clip_record(path, **changes) -> TwiffRecord:
    fields = dict(id="r", video=str(path), question="frame_1\n<image>\nframe_3\n<image>\nWhere next? → ö", image=[1, 3])
    fields |= dict(reasoning=(Text("it moves right"), Frame(4), Frame(5), Text("so")), answer="B")
    return TwiffRecord(**(fields | changes))


@pytest.mark.parametrize("spans", [True, False])
@pytest.mark.parametrize("media", ["images", "video"])
def test_lengths_from_headers_are_those_of_the_collator(parts, records, media, spans):
    lengths = RecordLengths(*parts, media, spans)
    for record in records[:4]:
        header = clip_header(record.video)
        expected = encoded(parts, record, media, spans)
        assert lengths.tokens(record, header) == expected, record.id
        assert expected <= lengths.at_most(record, header) < expected + 2000


@pytest.mark.parametrize("shape", [(48, 80, 17), (200, 120, 5), (112, 200, 9)])
@pytest.mark.parametrize("media", ["images", "video"])
def test_other_shapes_budgets_and_questions(parts, tmp_path, shape, media):
    """The spans' rule differs from the question frames': at most max_latent_token of them, or a fixed budget."""
    height, width, frames = shape
    path = tmp_path / "clip.mp4"
    write_video(path, np.random.default_rng(0).integers(0, 255, (frames, height, width, 3), dtype=np.uint8), fps=7.5)
    one, two = clip_record(path), clip_record(path, question="Where?", image=[1, 2, 8])
    for latent in (
        parts[1],
        dataclasses.replace(parts[1], max_latent_token=16),
        dataclasses.replace(parts[1], train_fixed_latent_budget=7),
    ):
        lengths = RecordLengths(parts[0], latent, media)
        for record in (one, two):
            assert lengths.tokens(record, clip_header(path)) == encoded(parts, record, media, True, latent)
    silent = clip_record(path, question="Where?", image=[])
    assert RecordLengths(*parts).tokens(silent, clip_header(path)) == encoded(parts, silent, "images", True)


def test_overlong_records_are_found_before_a_run(parts, records, tmp_path):
    """At load, all of them, and cheaply: words are not encoded where their bytes cannot make too many tokens."""
    long = dataclasses.replace(records[1], id="long", reasoning=(*records[1].reasoning, Text("word " * 300)))
    other = dataclasses.replace(long, id="other")
    given = Records([records[0], long, records[2], other])
    lengths = RecordLengths(*parts, max_length=encoded(parts, records[0], "images", True) + 200)
    kept = check_record_lengths(given, lengths, "skip")
    assert [record.id for record in kept] == [records[0].id, records[2].id]
    assert [bad.id for bad in kept.bad] == ["long", "other"]
    found = encoded(parts, long, "images", True)
    assert f"{found:,} tokens, data.max_length is {lengths.max_length:,}. Raise it; a" in kept.bad[0].reason
    with pytest.raises(DataError, match=r"2 of 4 records cannot be trained on.*\n  long: .* tokens.*\n  other: "):
        check_record_lengths(given, lengths)
    exact = RecordLengths(*parts, max_length=found)
    assert len(check_record_lengths(given, exact)) == 4
    with pytest.raises(DataError, match="2 of 4"):
        check_record_lengths(given, RecordLengths(*parts, max_length=found - 1))
    words = exact.processor.tokenizer
    exact.processor.tokenizer = None
    try:
        exact.max_length = 16384
        assert len(check_record_lengths(given, exact)) == 4
    finally:
        exact.processor.tokenizer = words


def test_a_clip_that_cannot_be_opened_and_one_that_the_processor_refuses(parts, records, tmp_path):
    (tmp_path / "noise.mp4").write_bytes(b"no video, but some bytes that are not empty at all")
    given = Records([records[0], clip_record(tmp_path / "noise.mp4")])
    (bad,) = check_record_lengths(given, RecordLengths(*parts), "skip").bad
    assert "noise.mp4: cannot be opened as a video" in bad.reason
    wide = RecordLengths(*parts).fault_of(records[0], ClipHeader(17, 16, 4000, 8.0))
    assert wide.startswith("the processor refuses its frames: ") and "aspect ratio" in wide


# ---- records that fail only when they are decoded -------------------------------------------------------------------


@pytest.fixture
def broken(records, tmp_path):
    """Six records; the third and fourth have clips whose headers are whole and whose frames are not."""
    given = list(records[:6])
    for i in (2, 3):
        clip = bytearray(Path(given[i].video).read_bytes())
        where = clip.index(b"mdat") + 4
        size = int.from_bytes(clip[where - 8 : where - 4], "big") - 8
        clip[where : where + size] = bytes(size)
        file = tmp_path / f"broken-{i}.mp4"
        file.write_bytes(clip)
        given[i] = dataclasses.replace(given[i], video=str(file))
    return given


def test_the_next_record_stands_in_for_one_that_fails(parts, broken):
    """By its place in the data alone: whatever the number of workers, and again in a run that goes on."""
    check_record_lengths(Records(broken), RecordLengths(*parts))  # headers tell nothing
    data = SftDataset(broken, on_bad="skip", max_failed=2)
    order = [5, 2, 0, 3]
    ids = [data[i].record.id for i in order]
    assert ids == [broken[i].id for i in (5, 4, 0, 4)]
    assert [[bad.id for bad in data[i].failed] for i in order] == [[], [broken[2].id, broken[3].id], [], [broken[3].id]]
    assert "broken-2.mp4: cannot be decoded" in data[2].failed[0].reason
    last = SftDataset([broken[0], broken[2]], on_bad="skip", max_failed=1)[1]
    assert last.record.id == broken[0].id  # behind the last comes the first
    assert len(list(SftDataset(broken[:2]))) == 2  # but a loop ends
    collate = SftCollator(*parts, "images")
    loader = DataLoader(data, batch_size=2, sampler=order, collate_fn=collate, num_workers=2)
    batches = list(loader)
    assert [id for batch in batches for id in batch["record_ids"]] == ids
    assert [[id for id, _ in batch["failed"]] for batch in batches] == [[broken[2].id, broken[3].id], [broken[3].id]]


def test_too_many_in_a_row_end_the_run(broken):
    with pytest.raises(RecordFailed, match=r"2 records failed in this run, data.max_failed is 1\. [^\n]*data check"):
        SftDataset(broken, on_bad="skip", max_failed=1)[2]
    with pytest.raises(RecordFailed):  # none is left
        SftDataset([broken[2]], on_bad="skip", max_failed=9)[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_under_raise_the_error_names_record_file_reason_and_the_way_on(broken, workers):
    loader = DataLoader(SftDataset(broken), batch_size=1, sampler=[2], collate_fn=list, num_workers=workers)
    with pytest.raises(RecordFailed) as caught:
        list(loader)
    message = str(caught.value)
    assert message.startswith(f"record {broken[2].id}: {broken[2].video}: cannot be decoded (")  # and no traceback
    assert message.endswith("go on without it by data.on_bad=skip.")


def test_a_header_that_lies_is_found_when_the_record_is_decoded(parts, records):
    lengths = RecordLengths(*parts, max_length=1)
    with pytest.raises(RecordFailed, match=rf"record {records[0].id}: .*mp4: \d+ tokens, data.max_length is 1"):
        SftDataset(list(records), fault=lengths.fault)[0]
    assert RecordLengths(*parts).fault(SftDataset(list(records))[0]) is None
    silent = dataclasses.replace(records[0], image=[], question="Where?")
    sample: SftSample = SftDataset([silent])[0]
    assert (lengths.fault(sample) or "").startswith(f"{encoded(parts, silent, 'images', True)} tokens")
