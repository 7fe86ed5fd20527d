"""The journal and final files: killed runs, full disks, several parts."""

import errno
import json
import os
import subprocess
import sys

import pytest

from future_l1_plugin import journal as journal_module
from future_l1_plugin.errors import DataError
from future_l1_plugin.journal import Journal, atomic_write, checkpoint_mark, file_mark, json_line, key_of

# Keys ---------------------------------------------------------------------------------------------------------------


def test_keys_depend_on_every_part_and_not_on_the_order_of_fields():
    assert key_of({"a": 1, "b": [2]}) == key_of({"b": [2], "a": 1})
    assert len({key_of("x"), key_of("x", None), key_of(["x"]), key_of("ä"), key_of("\ud800")}) == 5


def test_keys_stay_what_they_are():
    """A changed hash would make every journal on users' disks worthless."""
    assert key_of({"a": "ä"}, [1, None]) == "b9e076e42cfef99e3956c1c9ba2e039d"


def test_file_mark_sees_content_and_time(tmp_path):
    file = tmp_path / "clip.mp4"
    assert file_mark(file) == [str(file)]
    file.write_bytes(b"1")
    first = file_mark(file)
    os.utime(file, ns=(0, 1))
    second = file_mark(file)
    file.write_bytes(b"12")
    assert len({str(mark) for mark in (first, second, file_mark(file))}) == 3


def test_checkpoint_mark_is_its_files_or_its_name(tmp_path):
    assert checkpoint_mark("org/name") == ["org/name"]
    for name in ("model.safetensors", "config.json", "notes.md"):
        (tmp_path / name).write_text(name)
    assert checkpoint_mark(tmp_path) == [file_mark(tmp_path / "config.json"), file_mark(tmp_path / "model.safetensors")]


# Rows ---------------------------------------------------------------------------------------------------------------


def test_a_cut_line_costs_only_its_row(tmp_path, caplog):
    file = tmp_path / "log.jsonl"
    log = Journal(file)
    log.append([{"key": "a", "text": "ä\n\u2028"}, {"key": "b", "text": "2"}])
    file.write_bytes(file.read_bytes()[:-5])
    again = Journal(file)
    assert list(again.read()) == ["a"]
    again.append([{"key": "c", "text": "3"}])
    again.append([{"key": "d", "text": "4"}])
    caplog.clear()
    assert {key: row["text"] for key, row in again.read().items()} == {"a": "ä\n\u2028", "c": "3", "d": "4"}
    assert f"{file}: 1 broken line(s)" in caplog.text


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_cut_anywhere_is_noticed(tmp_path, cut):
    """Within a character, too."""
    file = tmp_path / "log.jsonl"
    line = b'{"key": "\xc3\xa4"}\n'
    file.write_bytes(line + line.replace(b"\xc3\xa4", b"b\xc3")[:-cut] + b"\n")
    assert set(Journal(file).read()) == {"ä"}


def test_lines_of_other_things_are_no_rows(tmp_path, caplog):
    file = tmp_path / "log.jsonl"
    file.write_bytes(b'17\n"text"\n[]\n{"no": "key"}\n{"key": 3}\n\x00\x00\x00\n\n{"key": "a"}\n')
    assert Journal(file).read() == {"a": {"key": "a"}}
    assert "6 broken line(s)" in caplog.text


def test_several_parts(tmp_path):
    file = tmp_path / "log[1].jsonl"
    for part in (0, 1, 10):
        Journal(file, part).append([{"key": str(part)}])
    names = ["log[1].jsonl", "log[1].rank1.jsonl", "log[1].rank10.jsonl"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert set(Journal(file, 0).read()) == set(Journal(file, 1).read()) == {"0", "1", "10"}


def test_the_later_row_counts_and_nothing_is_written_for_no_rows(tmp_path):
    log = Journal(tmp_path / "sub" / "log.jsonl")
    log.append([])
    assert not log.path.exists()
    log.append([{"key": "a", "n": 1}, {"key": "b", "n": 1}])
    log.append([{"key": "a", "n": 2}])
    assert [row["n"] for row in log] == [1, 1, 2]
    assert log.read()["a"]["n"] == 2


def test_half_characters_and_strange_values():
    assert json_line({"a": "ä"}) == '{"a": "ä"}\n'.encode()
    assert json.loads(json_line({"a": "ä\ud800"})) == {"a": "ä\ud800"}
    assert json_line([b"xy"], default=len) == b"[2]\n"


# Full disks ---------------------------------------------------------------------------------------------------------


def full_after(monkeypatch, count, code=errno.ENOSPC):
    """Let `os.write` write `count` more bytes, as a disk does that fills up in the middle of a row."""
    real, left = os.write, [count]

    def write(file, data):
        if left[0] == 0:
            raise OSError(code, os.strerror(code))
        written = real(file, bytes(data)[: left[0]])
        left[0] -= written
        return written

    monkeypatch.setattr(journal_module.os, "write", write)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("torn", [b"", b'{"key": "tor'])
@pytest.mark.parametrize("count", [0, 1, 30, 45])
def test_a_full_disk_leaves_whole_rows_and_says_so(tmp_path, monkeypatch, count, torn, code):
    file = tmp_path / "log.jsonl"
    log = Journal(file)
    log.append([{"key": "a", "text": "kept"}])
    file.write_bytes(file.read_bytes() + torn)
    before = file.read_bytes()
    with monkeypatch.context() as patch:
        full_after(patch, count, code)
        with pytest.raises(DataError) as error:
            log.append([{"key": name, "text": "lost"} for name in "bcd"])
    message = str(error.value)
    assert message.startswith(f"{file}: cannot be written (")
    assert "finished before is kept: free space and run the same command again." in message
    assert file.read_bytes() == before
    log.append([{"key": "e"}])
    assert set(log.read()) == {"a", "e"}


def test_an_interrupt_leaves_whole_rows(tmp_path, monkeypatch):
    log = Journal(tmp_path / "log.jsonl")
    log.append([{"key": "a"}])

    def interrupted(file):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(journal_module.os, "fsync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            log.append([{"key": "b"}])
    assert log.path.read_bytes() == b'{"key": "a"}\n'


def test_rows_are_on_the_disk_when_append_returns(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(journal_module.os, "fsync", lambda file: synced.append(os.fstat(file).st_size))
    Journal(tmp_path / "log.jsonl").append([{"key": "a"}])
    assert synced == [(tmp_path / "log.jsonl").stat().st_size]


LIMITED = """
import resource, sys
from future_l1_plugin.errors import DataError
from future_l1_plugin.journal import Journal, atomic_write
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
log = Journal(sys.argv[1] + "/log.jsonl")
try:
    for n in range(100):
        log.append([{"key": str(n), "text": "x" * 50}])
except DataError as error:
    print(error)
try:
    with atomic_write(sys.argv[1] + "/final.json") as file:
        file.write(b"x" * 1001)
except DataError as error:
    print(error)
"""


def test_a_real_limit(tmp_path):
    (tmp_path / "final.json").write_text("old")
    command = [sys.executable, "-c", LIMITED, str(tmp_path)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line.split(": ")[0] for line in said] == [str(tmp_path / "log.jsonl"), str(tmp_path / "final.json")]
    assert all("free space and run" in line for line in said)
    rows = Journal(tmp_path / "log.jsonl").read()
    assert list(rows) == [str(n) for n in range(len(rows))] and len(rows) > 10
    assert (tmp_path / "log.jsonl").read_bytes().endswith(b'"}\n')
    assert (tmp_path / "final.json").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["final.json", "log.jsonl"]


def test_other_faults_of_the_disk_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"log.jsonl: cannot be written .*fix that and run the same command again"):
        Journal(tmp_path / "file" / "log.jsonl").append([{"key": "a"}])
    with pytest.raises(DataError, match=r"out.json: cannot be written"), atomic_write(tmp_path / "none" / "out.json"):
        pass


# Final files --------------------------------------------------------------------------------------------------------


def test_a_final_file_appears_when_it_is_whole(tmp_path):
    target = tmp_path / "out.json"
    with atomic_write(target) as file:
        file.write(b"whole")
        file.flush()
        assert not target.exists()
    assert target.read_bytes() == b"whole"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("fails_in", ["body", "sync", "rename"])
def test_a_broken_write_keeps_the_old_file(tmp_path, monkeypatch, fails_in):
    target = tmp_path / "out.json"
    target.write_bytes(b"old")

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    if fails_in == "sync":
        monkeypatch.setattr(journal_module.os, "fsync", fail)
    if fails_in == "rename":
        monkeypatch.setattr(journal_module.os, "replace", fail)
    with pytest.raises(ValueError if fails_in == "body" else DataError), atomic_write(target) as file:
        file.write(b"new")
        if fails_in == "body":
            raise ValueError
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_what_a_killed_run_left_is_deleted(tmp_path):
    (tmp_path / ".out.json.1.part").write_bytes(b"half")
    (tmp_path / ".other.json.1.part").write_bytes(b"of another file")
    with atomic_write(tmp_path / "out.json") as file:
        file.write(b"whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.json.1.part", "out.json"]


def test_several_may_write_one_file(tmp_path):
    (tmp_path / ".out.json.1.part").write_bytes(b"another process is at it")
    with atomic_write(tmp_path / "out.json", alone=False) as file:
        file.write(b"whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.json.1.part", "out.json"]
