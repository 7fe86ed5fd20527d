"""Reading metrics.jsonl files: verl's and SFT's, whole, resumed and broken off."""

import json
import math

import pytest

from future_l1_plugin.errors import DataError
from future_l1_plugin.report.logs import read_rl_log, read_sft_log


def line(step, **data):
    return json.dumps({"step": step, "data": data}, separators=(",", ":")) + "\n"


@pytest.fixture
def read(tmp_path):
    def read(text, reader=read_rl_log):
        (tmp_path / "metrics.jsonl").write_text(text)
        return reader(tmp_path / "metrics.jsonl")

    return read


def test_series_in_order_without_what_is_no_number(read):
    log = read(line(0, val=1) + line(2, reward=0.5, note="x", on=True) + line(1, reward=1) + line(3, reward=None))
    assert list(log.steps) == [0, 1, 2, 3]
    assert log.series("reward") == [(1, 1.0), (2, 0.5)]
    assert log.series("on") == log.series("note") == log.series("missing") == []


def test_spaces_between_keys_are_read_too(read):
    assert read('{"step": 4, "data": {"reward": 0.25}}\n').series("reward") == [(4, 0.25)]


def test_half_a_line_at_the_end_is_left_out(read):
    whole = line(1, reward=0.1) + line(2, reward=0.2)
    for cut in range(1, len(line(3, reward=0.3)) - 1):
        assert read(whole + line(3, reward=0.3)[:cut]).series("reward") == [(1, 0.1), (2, 0.2)]


def test_of_steps_told_twice_the_last_counts(read):
    text = line(1, reward=0.1) + line(2, reward=0.2) + line(3, reward=0.3) + line(2, reward=0.7) + line(3, reward=0.8)
    assert read(text).series("reward") == [(1, 0.1), (2, 0.7), (3, 0.8)]


def test_validation_on_resuming_does_not_take_the_rollouts_of_its_step(read):
    log = read(line(2, reward=0.2) + line(2, **{"val-core/a/acc/mean@1": 0.5}))
    assert log.steps == {2: {"reward": 0.2, "val-core/a/acc/mean@1": 0.5}}


def test_a_resumed_run_that_writes_on_after_half_a_line(read):
    half = line(3, reward=0.3)[:12]
    for between in ("", "\n"):
        log = read(line(2, reward=0.2) + half + between + line(3, reward=0.4) + line(4, reward=0.5))
        assert log.series("reward") == [(2, 0.2), (3, 0.4), (4, 0.5)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a line a step, found none"),
        ('{"step":0,"da', "found none"),
        ('{"step": 1, "loss": 2.0, "ce_loss": 1.0}\n', r":1: expected .*verl.*found the keys step, loss, ce_loss"),
        (line(1, a=1) + "Traceback\n" + line(2, a=1), r':2: expected a JSON object with a `step`, found "Traceback"'),
        (line(1, a=1) + "[1]\n" + line(2, a=1), r":2: expected a JSON object"),
    ],
)
def test_errors(read, text, message):
    with pytest.raises(DataError, match=message):
        read(text)


def test_no_file(tmp_path):
    with pytest.raises(DataError, match=r"no such file.*trainer\.logger"):
        read_rl_log(tmp_path / "metrics.jsonl")


def test_validation_weighs_sources_equally(read):
    data = {f"val-core/futurebench/hop{i}/acc/mean@1": p for i, p in ((1, 0.2), (2, 0.6), (3, 0.75), (5, 0.45))}
    others = {"val-core/futurebench/hop1/acc/best@4/mean": 0.9, "val-aux/futurebench/hop1/accuracy/mean@1": 0.9}
    log = read(line(0, **data, **others) + line(1, reward=0.5) + line(10, **{"val-core/twiff/acc/mean@4": 0.3}))
    (zero, first), (ten, second) = log.validation()
    assert (zero, ten) == (0, 10)
    assert first.value == pytest.approx(0.5) and first.stderr is None
    assert second.value == 0.3
    # 120 questions of 4 sources, 30 each: variances .16, .24, .1875, .2475 over 30, their root over 4.
    with_error = log.validation(120)[0][1]
    assert with_error.stderr == pytest.approx(math.sqrt((0.16 + 0.24 + 0.1875 + 0.2475) / 30) / 4)


def test_validation_of_one_source_has_the_plain_binomial_error(read):
    log = read(line(0, **{"val-core/a/acc/mean@1": 0.2}))
    assert log.validation(100)[0][1].stderr == pytest.approx(0.04)


def test_numbers_of_questions_that_were_logged_come_first(read):
    data = {"val-core/a/acc/mean@1": 0.5, "val-core/b/acc/mean@1": 0.5}
    log = read(line(0, **data, **{"val-aux/a/questions": 25, "val-aux/b/questions": 100}))
    for questions in (None, 7):
        stderr = log.validation(questions)[0][1].stderr
        assert stderr == pytest.approx(math.sqrt(0.25 / 25 + 0.25 / 100) / 2)


def test_sft_files(read):
    rows = '{"step": 1, "ce_loss": 2.0}\n{"step": 10, "ce_loss": 1.0}\n'
    assert [row["ce_loss"] for row in read(rows + '{"step": 20, "ce_', read_sft_log)] == [2.0, 1.0]
    assert read(line(1, reward=1), read_sft_log) == []
