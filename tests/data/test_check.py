"""`future-l1 data check` on real videos: every fault, every way to die, and the same files in the end."""

import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from future_l1_plugin import cli
from future_l1_plugin.data import check as check_module
from future_l1_plugin.data import load_records, make_world
from future_l1_plugin.data.check import FAULTS, check_data
from future_l1_plugin.data.video_writer import write_video
from future_l1_plugin.errors import ConfigError, DataError

FINAL = ("clean.jsonl", "rejected.jsonl", "summary.json")
RECORDS = 304


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"), test=16, train=RECORDS, progress=False)


@pytest.fixture(scope="module")
def rows(world):
    return json.loads(world.sft.read_text())


def write_jsonl(path, lines):
    """Lines are rows, or text as it is to stand there."""
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def finals(out):
    return {name: (out / name).read_bytes() for name in FINAL}


def faults(out):
    return {row["id"]: row["fault"] for row in read_jsonl(out / "rejected.jsonl")}


# The command in a process of its own --------------------------------------------------------------------------------

# The command, with a decoder that notes what it is asked for. Worker processes import the main script, and so have it.
DRIVER = """
import os, signal, sys, time
from pathlib import Path
from future_l1_plugin.data import check_pool

real, here = check_pool.read_frames, Path(__file__).parent

def read_frames(video, **options):
    with open(here / "decoded.txt", "a") as log:
        log.write(f"{{Path(video).stem}}\\n")
    time.sleep({pause})
    {act}
    return real(video, **options)

check_pool.read_frames = read_frames

if __name__ == "__main__":
    from future_l1_plugin.cli import main
    {first}
    sys.exit(main())
"""


class Driver:
    """Runs `future-l1 data check` on `data`; `act` is done before a video is decoded, `first` before the command."""

    def __init__(self, folder, data, videos, pause=0.0, act="pass", first="pass", more=()):
        folder.mkdir()
        self.folder, self.out = folder, folder / "out"
        self.script, self.log = folder / "driver.py", folder / "decoded.txt"
        self.log.touch()
        self.write(pause, act, first)
        self.command = [sys.executable, str(self.script), "data", "check", str(data), "--videos", str(videos)]
        self.command += ["--out", str(self.out), "--workers", "2", *more]

    def write(self, pause=0.0, act="pass", first="pass"):
        self.script.write_text(DRIVER.format(pause=pause, act=act, first=first))

    def start(self):
        return subprocess.Popen(self.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def run(self, code=0):
        """What the command prints."""
        process = self.start()
        said, _ = process.communicate(timeout=300)
        assert process.returncode == code, said
        return said

    def decoded(self):
        """Names of the videos that were decoded so far, in order."""
        return self.log.read_text().split()

    def judged(self):
        """Names of the videos that have a verdict in the journal."""
        journal = self.out / "verdicts.jsonl"
        whole = journal.read_bytes().split(b"\n")[:-1] if journal.exists() else []
        return [Path(json.loads(line)["video"]).stem for line in whole if line.endswith(b"}")]


# Clean data ---------------------------------------------------------------------------------------------------------


def test_a_clean_world_with_the_installed_command(world, rows, tmp_path):
    command = [Path(sys.executable).with_name("future-l1"), "data", "check", world.sft, "--videos", world.videos]
    done = subprocess.run([*command, "--out", tmp_path / "out"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"data.records={tmp_path / 'out' / 'clean.jsonl'} data.videos={world.videos}" in done.stdout
    assert read_jsonl(tmp_path / "out" / "rejected.jsonl") == []
    assert list(load_records(tmp_path / "out" / "clean.jsonl", world.videos)) == list(
        load_records(world.sft, world.videos)
    )
    assert [row["video"] for row in read_jsonl(tmp_path / "out" / "clean.jsonl")] == [row["video"] for row in rows]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    used = sum(len({*row["image"], *row["reasoning_image"]}) for row in rows)
    counted = {"root": str(world.videos), "named": RECORDS, "with_clean_rows": RECORDS, "frames_decoded": used}
    assert summary["videos"] == counted
    assert [summary[key] for key in ("rows", "clean", "rejected", "faults")] == [RECORDS, RECORDS, 0, {}]
    assert summary["decoder"]["backend"] == "pyav" and summary["decoder"]["libavcodec"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted([*FINAL, "verdicts.jsonl"])


def raw(row):
    """The row as TwiFF-2.7M spells it."""
    human, gpt = (turn["value"] for turn in row["conversations"])
    answer = f"{gpt.replace('<image>', '<rimage>')}<ans>{row['answer']}</ans>"
    spelled = {"question": human, "answer": answer, "video": row["video"], "id": row["id"]}
    return spelled | {"question_images_index": row["image"], "reasoning_images_index": row["reasoning_image"]}


def interleave(row):
    human, gpt = (turn["value"] for turn in row["conversations"])
    turns = [human, f"{gpt.replace('<image>', '<rimage>')}<ans>{row['answer']}</ans>"]
    conversations = [{"from": who, "value": text} for who, text in zip(("human", "gpt"), turns, strict=True)]
    kept = {"id": row["id"], "video": row["video"], "conversations": conversations}
    return kept | {"frames": row["image"], "recon_frames": row["reasoning_image"]}


@pytest.mark.parametrize("place", ["files", "folder", "hub"])
def test_three_spellings_from_files_a_folder_and_the_hub(world, rows, tmp_path, monkeypatch, place):
    folder = tmp_path / "data"
    (folder / "b").mkdir(parents=True)
    write_jsonl(folder / "a.jsonl", rows[:8])
    (folder / "b" / "one.json").write_text(json.dumps([interleave(row) for row in rows[8:16]]))
    pq.write_table(pa.Table.from_pylist([raw(row) for row in rows[16:24]]), folder / "b" / "two.parquet")
    (folder / "dataset_infos.json").write_text("{}")
    data = [folder]
    if place == "files":
        data = [folder / "a.jsonl", folder / "b" / "one.json", folder / "b" / "two.parquet"]
    if place == "hub":  # how a dataset is downloaded is tested in test_sources.py
        import huggingface_hub

        monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(folder))
        data = ["org/name"]
    outcome = check_data(data, world.videos, tmp_path / "out", workers=1)
    assert read_jsonl(outcome.out / "rejected.jsonl") == []
    expected = list(load_records(world.sft, world.videos))[:24]
    assert list(load_records(outcome.out / "clean.jsonl", world.videos)) == expected
    assert [file["rows"] for file in outcome.summary["files"]] == [8, 8, 8]
    if place != "files":  # load_records reads the same
        assert list(load_records(data[0], world.videos)) == expected


def test_rows_without_ids_of_files_with_one_name(world, rows, tmp_path):
    for name, row in (("one", rows[0]), ("two", rows[1])):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "rows.jsonl", [{**row, "id": None}])
    outcome = check_data([tmp_path / "one", tmp_path / "two"], world.videos, tmp_path / "out", workers=1)
    assert [row["id"] for row in read_jsonl(outcome.out / "clean.jsonl")] == ["one/rows.jsonl:1", "two/rows.jsonl:1"]


# Faults -------------------------------------------------------------------------------------------------------------


def noise(frames, side=64):
    return np.random.default_rng(0).integers(0, 256, (frames, side, side, 3), dtype=np.uint8)


def damaged_clips(folder):
    """whole.mp4, overwritten.mp4 (in its middle), cut.mp4, empty.mp4, late.mp4 (in its last fifth)."""
    folder.mkdir()
    write_video(folder / "whole.mp4", noise(40), fps=8)
    data = (folder / "whole.mp4").read_bytes()
    start, end = data.index(b"mdat") + 4, data.rindex(b"moov") - 4
    for name, at in (("overwritten", (start + end) // 2), ("late", start + (end - start) * 8 // 10)):
        spoiled = bytearray(data)
        spoiled[at : at + 3000] = np.random.default_rng(1).bytes(3000)
        (folder / f"{name}.mp4").write_bytes(spoiled)
    (folder / "cut.mp4").write_bytes(data[: len(data) * 6 // 10])
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "folder.mp4").mkdir()
    return folder


def row(id, video="whole.mp4", image=(1,), future=(2,), answer="B", human=None, gpt=None, **extras):
    human = "<image>" * len(image) + "What next?" if human is None else human
    gpt = "It goes on." + "<image>" * len(future) if gpt is None else gpt
    turns = [{"from": "human", "value": human}, {"from": "gpt", "value": gpt}]
    fields = {"conversations": turns, "video": video, "image": list(image), "reasoning_image": list(future)}
    return {"id": id, **fields, "answer": answer, **extras}


EVERY_FAULT = [  # row, fault, words of the reason
    (row("good"), None, ""),
    (json.dumps(row("half"))[:100], "not_json", "Write the line again"),
    ([1, 2], "record", "found list"),
    (row("no video", video=None), "record", "`video` is missing"),
    (row("nan", gain=float("nan")), "record", "cannot be written as JSON"),
    (row("half a character", cot="\ud800"), "record", "cannot be written as JSON"),
    (row("thoughts of thoughts", gpt="THOUTHOUGHT 1:GHT 2: a<image>"), "record", "would read back as"),
    (row("no human turn") | {"conversations": [{"from": "gpt", "value": "a<image>"}]}, "turns", "no human turn"),
    (row("no gpt turn") | {"conversations": [{"from": "human", "value": "a<image>"}]}, "turns", "no gpt turn"),
    (row("number 0", image=(0,)), "frames", "`image` holds 0"),
    (row("number 9", future=(9,)), "frames", "`reasoning_image` holds 9"),
    (row("count", gpt="a"), "frames", "0 image placeholders and `reasoning_image` has 1"),
    (row("no frame", image=(), future=()), "frames", "no frame is used"),
    (row("empty image", image=()), "no_question_frame", "the question shows no frame (`image` is empty)"),
    (row("no answer", answer=" "), "answer", "the answer is empty"),
    (row("good", answer="C"), "duplicate_id", "the id is taken by"),
    (row("token", answer="<|im_end|>"), "control_token", "spells <|im_end|>"),
    (row("token in question", human="<image><|image_pad|>"), "control_token", "the question spells <|image_pad|>"),
    (row("missing", video="none.mp4"), "video_missing", "none.mp4: no such video"),
    (row("empty", video="empty.mp4"), "video_damaged", "0 bytes"),
    (row("folder", video="folder.mp4"), "video_damaged", "not a file"),
    (row("cut", video="cut.mp4"), "video_damaged", "cut off"),
    (row("overwritten", video="overwritten.mp4", image=(1, 4), future=(8,)), "video_damaged", "cannot be decoded"),
    (row("late 8", video="late.mp4", image=(1, 2), future=(8,)), "video_damaged", "cannot be decoded"),
    (row("late 3", video="late.mp4", image=(1, 2), future=(3,)), None, ""),  # the frames it uses are there
    (row("late 3 again", video="late.mp4", image=(1, 3), future=(2,)), None, ""),
    (row("also good", gain=4, meta_data={"start": 0.5}), None, ""),
]


def test_every_fault(tmp_path, capsys):
    videos = damaged_clips(tmp_path / "videos")
    data = write_jsonl(tmp_path / "rows.jsonl", [content for content, _, _ in EVERY_FAULT])
    command = ["data", "check", str(data), "--videos", str(videos), "--out", str(tmp_path / "out"), "--workers", "1"]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out

    rejected = read_jsonl(tmp_path / "out" / "rejected.jsonl")
    expected = [(n, fault, words) for n, (_, fault, words) in enumerate(EVERY_FAULT, start=1) if fault]
    assert [(row["source"], row["fault"]) for row in rejected] == [(f"{data}:{n}", fault) for n, fault, _ in expected]
    for line, (n, _, words) in zip(rejected, expected, strict=True):
        assert words in line["reason"] and line["reason"].endswith(".")
        content = EVERY_FAULT[n - 1][0]
        assert str(line["row"]) == str(content)  # as it came; as text, because NaN differs from itself
        assert line["id"] == (content["id"] if isinstance(content, dict) else "-")
    good = [content for content, fault, _ in EVERY_FAULT if fault is None]
    assert [row["id"] for row in read_jsonl(tmp_path / "out" / "clean.jsonl")] == [row["id"] for row in good]

    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    counts = Counter(fault for _, fault, _ in expected)
    assert summary["faults"] == counts and list(summary["faults"]) == [kind for kind in FAULTS if counts[kind]]
    assert (summary["rows"], summary["clean"], summary["rejected"]) == (len(EVERY_FAULT), len(good), len(expected))
    assert summary["videos"] | {"root": ""} == {"root": "", "named": 7, "with_clean_rows": 2, "frames_decoded": 2 + 3}
    assert all(kind in printed for kind in counts) and str(tmp_path / "out" / "rejected.jsonl") in printed.replace(
        "\n", ""
    )

    before = finals(tmp_path / "out")
    assert cli.main([*command, "--strict"]) == 1
    assert cli.main([*command[:-1], "2"]) == 0
    assert finals(tmp_path / "out") == before
    shutil.rmtree(tmp_path / "out")
    assert cli.main([*command[:-1], "2"]) == 0
    assert finals(tmp_path / "out") == before


def test_values_of_parquet_that_json_lacks(tmp_path):
    videos = damaged_clips(tmp_path / "videos")
    table = [row("bytes", thumb=b"\xff\xd8"), row("null"), row("more", thumb=b"")]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "rows.parquet")
    outcome = check_data([tmp_path / "rows.parquet"], videos, tmp_path / "out", workers=1)
    (first, last) = read_jsonl(outcome.out / "rejected.jsonl")
    assert (first["fault"], first["row"]["thumb"], last["row"]["thumb"]) == ("record", "<2 bytes>", "<0 bytes>")
    assert "cannot be written as JSON" in first["reason"]
    assert [row["id"] for row in read_jsonl(outcome.out / "clean.jsonl")] == ["null"]


def test_nothing_clean_points_to_the_videos(world, rows, tmp_path, capsys):
    (tmp_path / "elsewhere").mkdir()
    data = write_jsonl(tmp_path / "rows.jsonl", rows[:2])
    command = ["data", "check", str(data), "--videos", str(tmp_path / "elsewhere"), "--out", str(tmp_path / "out")]
    assert cli.main([*command, "--workers", "1"]) == 0
    assert f"Check that the videos lie in {tmp_path / 'elsewhere'}" in capsys.readouterr().out.replace("\n", "")
    assert (tmp_path / "out" / "clean.jsonl").read_bytes() == b""


# What is decoded ----------------------------------------------------------------------------------------------------


def test_a_video_is_opened_once_and_only_what_changed_is_decoded_again(world, rows, tmp_path):
    videos = tmp_path / "videos"
    shutil.copytree(world.videos, videos)
    three = [{**row, "id": f"{row['id']} {n}"} for n in range(3) for row in rows[:10]]  # a video's rows lie apart
    three += [{**rows[0], "id": "another"}, rows[0]]
    data = write_jsonl(tmp_path / "rows.jsonl", three)
    names = [Path(row["video"]).stem for row in rows[:10]]
    driver = Driver(tmp_path / "run", data, videos)

    driver.run()
    assert sorted(driver.decoded()) == names
    first = finals(driver.out)

    driver.log.write_text("")
    driver.run()
    assert driver.decoded() == [] and finals(driver.out) == first

    three[13]["answer"] = "another answer"  # of the fourth video
    write_jsonl(data, three)
    os.utime(videos / three[5]["video"])
    (videos / three[6]["video"]).unlink()
    driver.run()
    assert sorted(driver.decoded()) == [names[3], names[5], names[6]]
    assert faults(driver.out) == {f"{rows[6]['id']} {n}": "video_missing" for n in range(3)}

    driver.log.write_text("")
    shutil.copy2(world.videos / three[6]["video"], videos / three[6]["video"])  # the very same file again
    driver.run()
    assert driver.decoded() == [] and faults(driver.out) == {}


def test_a_fault_of_the_day_is_not_kept(world, rows, tmp_path):
    data = write_jsonl(tmp_path / "rows.jsonl", rows[:4])
    act = f"if {Path(rows[1]['video']).stem!r} in video: raise OSError(5, 'Input/output error')"
    driver = Driver(tmp_path / "run", data, world.videos, act=act)
    driver.run()
    assert faults(driver.out) == {rows[1]["id"]: "video_unreadable"}
    assert "Input/output error" in (driver.out / "rejected.jsonl").read_text()
    driver.write()
    driver.log.write_text("")
    driver.run()
    assert driver.decoded() == [Path(rows[1]["video"]).stem]
    assert faults(driver.out) == {}


# Workers that die ---------------------------------------------------------------------------------------------------


def test_a_video_that_kills_its_decoder_is_rejected_alone(world, rows, tmp_path):
    killers = [Path(rows[n]["video"]).stem for n in (3, 4, 21)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows[:40])
    driver = Driver(
        tmp_path / "run", data, world.videos, act=f"if Path(video).stem in {killers}: os.kill(os.getpid(), 11)"
    )
    driver.run()
    assert faults(driver.out) == {rows[n]["id"]: "decoder_crash" for n in (3, 4, 21)}
    reasons = [row["reason"] for row in read_jsonl(driver.out / "rejected.jsonl")]
    assert all(
        f"{name}.mp4: the process that decoded it died." in text for name, text in zip(killers, reasons, strict=True)
    )
    assert [row["id"] for row in read_jsonl(driver.out / "clean.jsonl")] == [
        row["id"] for n, row in enumerate(rows[:40]) if n not in (3, 4, 21)
    ]
    driver.log.write_text("")
    driver.run()  # the verdict is kept
    assert driver.decoded() == []


def test_a_process_that_dies_by_accident_costs_no_row(world, rows, tmp_path):
    data = write_jsonl(tmp_path / "rows.jsonl", rows[:24])
    once = "flag = here / 'died'\n    if not flag.exists(): flag.touch(); os._exit(9)"
    driver = Driver(tmp_path / "run", data, world.videos, act=once)
    driver.run()
    assert faults(driver.out) == {} and set(driver.judged()) == {Path(row["video"]).stem for row in rows[:24]}


def test_a_video_is_not_blamed_for_what_was_read_before_it(world, rows, tmp_path):
    data = write_jsonl(tmp_path / "rows.jsonl", rows[:9])
    # Of each process.
    third = "check_pool.reads = getattr(check_pool, 'reads', 0) + 1\n    if check_pool.reads == 3: os._exit(1)"
    driver = Driver(tmp_path / "run", data, world.videos, act=third)
    driver.run()
    assert faults(driver.out) == {}


def test_only_the_rows_that_use_the_deadly_frames_are_rejected(tmp_path):
    videos = damaged_clips(tmp_path / "videos")
    data = write_jsonl(tmp_path / "rows.jsonl", [row("early"), row("late", future=(7,)), row("early, too")])
    driver = Driver(tmp_path / "run", data, videos, act="if 7 in options['frames'].numbers: os._exit(1)")
    driver.run()
    assert faults(driver.out) == {"late": "decoder_crash"}


def test_processes_that_never_start_are_no_fault_of_videos(world, tmp_path):
    script = tmp_path / "no_guard.py"
    script.write_text(
        "import sys\nfrom future_l1_plugin.data.check import check_data\n"
        f"check_data([{str(world.sft)!r}], {str(world.videos)!r}, {str(tmp_path / 'out')!r}, workers=1)\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode == 1 and "EnvironmentMismatch: the processes that decode die before" in done.stderr
    assert '`if __name__ == "__main__":`' in done.stderr
    assert list((tmp_path / "out").iterdir()) == []


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)  # returns when no worker holds the other end of the pipe any more


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_workers_end_with_a_killed_parent(world, tmp_path):
    note = "with open(here / 'pids.txt', 'a') as pids: pids.write(f'{os.getpid()}\\n')"
    driver = Driver(tmp_path / "run", world.sft, world.videos, pause=0.05, act=note)
    process = driver.start()
    pids = driver.folder / "pids.txt"
    while not pids.exists() or len(set(pids.read_text().split())) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    kill(process)
    deadline = time.monotonic() + 30
    while any(alive(pid) for pid in set(pids.read_text().split())):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.05)


# Full disks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [20_000, 100_000], ids=["journal", "final files"])
def test_a_full_disk_costs_nothing_but_time(world, tmp_path, limit):
    """The journal takes about 45 kB, clean.jsonl more than 200 kB."""
    unbroken = Driver(tmp_path / "unbroken", world.sft, world.videos)
    unbroken.run()
    assert (unbroken.out / "verdicts.jsonl").stat().st_size in range(30_000, 100_000)
    assert (unbroken.out / "clean.jsonl").stat().st_size > 100_000

    set_limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
    driver = Driver(tmp_path / "run", world.sft, world.videos, first=set_limit)
    said = driver.run(code=2)
    file = driver.out / ("verdicts.jsonl" if limit < 30_000 else "clean.jsonl")
    assert said.startswith(f"future-l1 data: {file}: cannot be written")
    assert "Everything finished before is kept: free space and run the same command again." in said
    assert [path.name for path in driver.out.iterdir()] == ["verdicts.jsonl"]
    kept = driver.judged()
    assert 0 < len(kept) <= RECORDS and (len(kept) == RECORDS) == (limit > 30_000)

    driver.write()
    driver.log.write_text("")
    driver.run()
    assert set(driver.decoded()).isdisjoint(kept)
    assert finals(driver.out) == finals(unbroken.out)


# Killed runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("files", [0, 1, 2])
def test_killed_between_the_final_files(world, rows, tmp_path, files):
    """The last one, summary.json, says that the other two belong together."""
    data = write_jsonl(tmp_path / "rows.jsonl", [*rows[:4], rows[0]])
    driver = Driver(tmp_path / "run", data, world.videos)
    driver.run()
    old = finals(driver.out)
    write_jsonl(data, [*rows[:3], rows[0], rows[1]])
    count = "import os, itertools; left, replace = itertools.count(), os.replace; "
    count += f"os.replace = lambda *names: os.kill(os.getpid(), 9) if next(left) == {files} else replace(*names)"
    driver.write(first=count)
    driver.run(code=-signal.SIGKILL)
    left = {path.name: path.read_bytes() for path in driver.out.iterdir() if path.name in FINAL}
    driver.write()
    driver.run()
    new = finals(driver.out)
    assert "summary.json" not in left
    assert all(content in (old[name], new[name]) for name, content in left.items())
    assert sum(content == new[name] for name, content in left.items()) == files
    assert sorted(path.name for path in driver.out.iterdir()) == sorted([*FINAL, "verdicts.jsonl"])


KILLS = 20


def test_killed_twenty_times_it_ends_with_the_same_files(world, rows, tmp_path):
    videos = tmp_path / "videos"
    shutil.copytree(world.videos, videos)
    for n in range(0, RECORDS, 10):
        clip = videos / rows[n]["video"]
        clip.write_bytes(clip.read_bytes()[:-200])
    lines = [{**row, "video": rows[n // 2]["video"]} if n % 3 == 0 else row for n, row in enumerate(rows)]
    lines[100], lines[200]["id"] = json.dumps(lines[100])[:80], lines[0]["id"]
    data = write_jsonl(tmp_path / "rows.jsonl", lines)
    pause = 0.02

    unbroken = Driver(tmp_path / "unbroken", data, videos, pause)
    began = time.monotonic()
    process = unbroken.start()
    while not unbroken.judged() and process.poll() is None:
        time.sleep(0.005)
    start = time.monotonic() - began
    said, _ = process.communicate()
    assert process.returncode == 0, said
    expected = finals(unbroken.out)
    assert len(expected["clean.jsonl"].splitlines()) > 200 and len(expected["rejected.jsonl"].splitlines()) > 30
    count = len(set(unbroken.judged()))

    # Most kills fall a random number of videos and a random time after the decoding began: a time alone would miss it
    # on a busy machine. The last, with little left to decode, fall anywhere from the start to the final files.
    draw = random.Random(0)
    driver = Driver(tmp_path / "run", data, videos, pause)
    progress = []
    for n in range(KILLS):
        before, log = driver.judged(), len(driver.decoded())
        process = driver.start()
        if n < KILLS - 5:
            goal = log + draw.randint(1, 2 * RECORDS // KILLS)
            while len(driver.decoded()) < goal and process.poll() is None:
                time.sleep(0.005)
            delay = draw.uniform(0, 0.1)
        else:
            delay = draw.uniform(0, 1.5 * start)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(delay)
        kill(process)
        assert set(driver.decoded()[log:]).isdisjoint(before), "a video was decoded after its verdict was written"
        progress.append(len(set(driver.judged())))
        for name in FINAL:
            assert not (driver.out / name).exists() or (driver.out / name).read_bytes() == expected[name]
        if (driver.out / "summary.json").exists():  # a kill came too late
            assert finals(driver.out) == expected
    assert len({done for done in progress if 0 < done < count}) >= 3, f"few kills hit the decoding: {progress}"

    before, log = driver.judged(), len(driver.decoded())
    driver.run()
    assert set(driver.decoded()[log:]).isdisjoint(before)
    assert finals(driver.out) == expected
    assert sorted(path.name for path in driver.out.iterdir()) == sorted([*FINAL, "verdicts.jsonl"])


# Arguments ----------------------------------------------------------------------------------------------------------


def test_arguments_that_cannot_be(world, rows, tmp_path, capsys):
    data = write_jsonl(tmp_path / "rows.jsonl", rows[:2])
    out = tmp_path / "out"

    def refuse(error, says, data=data, videos=world.videos, out=out, workers=1):
        with pytest.raises(error, match=says):
            check_data(data if isinstance(data, list) else [data], videos, out, workers)

    refuse(ConfigError, "workers: expected 1 or more, found 0", workers=0)
    refuse(ConfigError, "videos: expected the folder of the clips", videos=tmp_path / "none")
    refuse(ConfigError, "rows.jsonl: named twice", data=[data, tmp_path / "." / "rows.jsonl"])
    refuse(ConfigError, "out: .* lies in .*would be read as data", data=tmp_path, out=tmp_path / "sub" / "out")
    refuse(ConfigError, r"out: .*rows.jsonl lies in .*overwritten", out=tmp_path)
    refuse(ConfigError, "cannot be made a folder", out=data / "out")
    refuse(DataError, "no such file", data=tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    refuse(DataError, "empty.jsonl: no record in it", data=tmp_path / "empty.jsonl")
    (tmp_path / "broken.json").write_text("[1, ")
    refuse(DataError, "broken.json: not a JSON file", data=tmp_path / "broken.json")
    assert not (out / "summary.json").exists()
    assert cli.main(["data", "check", str(tmp_path / "none.jsonl"), "--videos", str(tmp_path), "--out", str(out)]) == 2
    assert capsys.readouterr().err.startswith("future-l1 data: ")


def test_data_that_changes_meanwhile(world, rows, tmp_path, monkeypatch):
    data = write_jsonl(tmp_path / "rows.jsonl", rows[:2])
    check_data([data], world.videos, tmp_path / "out", workers=1)
    before = finals(tmp_path / "out")
    real = check_module._decode
    for lines in ([rows[0], {**rows[1], "answer": "another"}], [rows[0]]):

        def decode(*arguments, lines=lines):
            found = real(*arguments)
            write_jsonl(data, lines)
            return found

        monkeypatch.setattr(check_module, "_decode", decode)
        with pytest.raises(DataError, match=r"rows.jsonl: changed during the check. Run the same command again"):
            check_data([data], world.videos, tmp_path / "out", workers=1)
        assert finals(tmp_path / "out") == before


def test_another_decoder_checks_again(world, rows, tmp_path, monkeypatch):
    data = write_jsonl(tmp_path / "rows.jsonl", rows[:2])
    check_data([data], world.videos, tmp_path / "out", workers=1)
    decoder = check_module._decoder()
    monkeypatch.setattr(check_module, "_decoder", lambda: {**decoder, "libavcodec": "0.0.1"})
    outcome = check_data([data], world.videos, tmp_path / "out", workers=1)
    assert outcome.summary["decoder"]["libavcodec"] == "0.0.1"
    assert len(read_jsonl(tmp_path / "out" / "verdicts.jsonl")) == 4
    assert dataclasses.asdict(outcome)["summary"]["clean"] == 2
