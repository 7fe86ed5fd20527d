"""Check every record before anything is trained on it: `future-l1 data check DATA --videos ROOT --out FOLDER`.

A record is clean if its row parses (`records.py`), its id is its own, its question shows a frame, its words spell no
control token, its video is there and every frame that it uses, of the question and of the reasoning, comes out of the
decoder. FOLDER receives

    clean.jsonl      the clean records as Future-L1-50K rows, videos relative to ROOT, in the order of the sources
    rejected.jsonl   the others, one line each: source, id, fault (a key of `FAULTS`), reason, and the row as it came
    summary.json     counts, and the decoder; written last, so its presence says that the other two belong together
    verdicts.jsonl   the journal of decoded rows, by which a killed run goes on where it was

The first three depend on the rows, the videos and the decoder alone: neither on the number of workers nor on the order
in which they finish, nor on how often the run was killed.

What the row alone shows is found anew in each run. What a video shows is found once: its verdict goes to the journal
under a key of the row's content, the video's path, size and time of change, and the decoder's version, so that only
what changed is decoded again. Rows of one video are checked together.

About 1 kB of each row stays in memory, and no frame. A .json file, which cannot be read in part, is there as a whole
while it is read. One run at a time may write to FOLDER.
"""

import contextlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from future_l1_plugin.data.check_pool import Clip, Fault, Faults, Frames, verdicts
from future_l1_plugin.data.record_files import RecordReader
from future_l1_plugin.data.records import BadRecordError, TwiffRecord, text_fault
from future_l1_plugin.data.sources import Row, RowFault, data_files, read_rows
from future_l1_plugin.errors import ConfigError, DataError, EnvironmentMismatch
from future_l1_plugin.journal import Journal, atomic_write, file_mark, json_line, key_of

#: Kinds of fault, in the order of the checks; a rejected row has the first that was found.
FAULTS = {
    "not_json": "the line is no JSON",
    "record": "fields are missing, of the wrong type, or cannot be written as JSON",
    "turns": "not one human and one gpt turn",
    "frames": "frame numbers outside the pool, or not as many as placeholders",
    "answer": "the answer is empty",
    "duplicate_id": "an earlier row has the id",
    "no_question_frame": "the question shows no frame (`image` is empty)",
    "control_token": "words spell a control token of the model",
    "video_missing": "no such video",
    "video_damaged": "the video is cut off, or a frame does not come out",
    "video_unreadable": "the video could not be read this time; tried again in the next run",
    "decoder_crash": "the decoder's process died",
}
#: Part of every key. Raise it when rows that were clean may be faulty by new rules, or the other way round.
_VERSION = 1
_CHUNK = 8  # videos that a worker is handed at once, and loses at most when it is killed


@dataclass(frozen=True)
class Outcome:
    """What `check_data` wrote: the folder, and the content of its summary.json."""

    out: Path
    summary: dict[str, Any]


def check_data(
    data: Sequence[str | os.PathLike],
    videos: str | os.PathLike,
    out: str | os.PathLike,
    workers: int | None = None,
) -> Outcome:
    """Check records and write clean.jsonl, rejected.jsonl and summary.json; see above.

    Args:
        data: files, folders or datasets of the hub (`sources.data_files`).
        videos: the folder that the rows' videos are relative to.
        out: the folder to write to. Verdicts of an earlier run into it are taken over.
        workers: processes that decode; None: one for each core.

    Raises:
        ConfigError: an argument that cannot be, or `out` and `data` within one another.
        DataError: no such data, a file that cannot be parsed as a whole or changes meanwhile, a full disk.
        EnvironmentMismatch: no video decoder, or worker processes do not start.
    """
    workers = _cores() if workers is None else workers
    if workers < 1:
        raise ConfigError(f"workers: expected 1 or more, found {workers}")
    if not os.path.isdir(videos):
        raise ConfigError(f"videos: expected the folder of the clips, found no folder {videos}")
    out, root = Path(out), os.path.abspath(videos)
    decoder = _decoder()
    files = _files(data, out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out: {out} cannot be made a folder ({error.strerror}). Choose another.") from error
    marks = [file_mark(file) for file in files]
    plan = _plan(files, root)
    faults = _decode(plan, decoder, Journal(out / "verdicts.jsonl"), workers)
    return Outcome(out, _write(files, marks, root, out, faults, decoder))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _decoder() -> dict[str, str]:
    """The backend that `read_frames` takes by itself, and its versions."""
    try:
        import av
    except ImportError:
        try:
            import decord
        except ImportError as error:
            raise EnvironmentMismatch("no video decoder is installed. Fix: pip install av") from error
        return {"backend": "decord", "decord": decord.__version__}
    return {
        "backend": "pyav",
        "av": av.__version__,
        "libavcodec": ".".join(map(str, av.library_versions["libavcodec"])),
    }


def _files(data: Sequence[str | os.PathLike], out: Path) -> list[Path]:
    """The files of all `data`, none of them twice, and none that this check writes."""
    files: list[Path] = []
    for name in data:
        if Path(name).is_dir() and out.resolve().is_relative_to(Path(name).resolve()):
            raise ConfigError(f"out: {out} lies in {name}, and would be read as data. Choose a folder elsewhere.")
        files += data_files(name)
    found: set[Path] = set()
    for file in map(Path.resolve, files):
        if file in found:
            raise ConfigError(f"{file}: named twice. Name each file once, and no folder besides its own files.")
        if file.is_relative_to(out.resolve()):
            raise ConfigError(f"out: {file} lies in {out}, and could be overwritten. Choose a folder elsewhere.")
        found.add(file)
    return files


# ---- what a row shows by itself -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Examined:
    """A row that is fine as far as it can be told without its video.

    content: hash of the row as it came; line: the row for clean.jsonl.
    """

    id: str
    video: str
    frames: Frames
    content: str
    line: bytes


def _examine(row: Row, reader: RecordReader, root: str) -> _Examined:
    """Raises BadRecordError."""
    record = reader.read(row)
    try:
        return _examined(row, record, root)
    except RowFault as fault:
        raise BadRecordError(row.source, record.id, str(fault), fault.kind) from fault


def _examined(row: Row, record: TwiffRecord, root: str) -> _Examined:
    """Raises RowFault."""
    frames = tuple(sorted({*record.image, *record.reasoning_image}))
    if not frames:
        raise RowFault(
            "no frame is used, neither in the question nor in the reasoning. Name some, or drop it.", "frames"
        )
    if not record.image:
        raise RowFault(
            "the question shows no frame (`image` is empty): RL and question_media: video cannot use it, nothing tells "
            "its future. Name frames of the pool, 1..8, or drop it; SFT with question_media: images takes it as text, "
            "from the file as it was.",
            "no_question_frame",
        )
    if reason := text_fault(record):
        raise RowFault(reason, "control_token")
    try:
        clean = record.to_dict(root)
    except DataError as error:
        raise RowFault(str(error)) from error
    try:
        line = (json.dumps(clean, ensure_ascii=False, allow_nan=False) + "\n").encode()
        content = key_of(row.value)
    except (TypeError, ValueError) as error:  # bytes or dates of parquet; infinities and NaN; half a character
        raise RowFault(f"cannot be written as JSON ({error}). Take the field out, or write it as text.") from error
    return _Examined(record.id, record.video, frames, content, line)


def _plan(files: Sequence[Path], root: str) -> dict[str, list[tuple[str, Frames]]]:
    """The rows whose video has to be looked at, by video: content and frames of each."""
    plan: dict[str, list[tuple[str, Frames]]] = {}
    same: dict[Frames, Frames] = {}  # few sets of frames serve many rows
    reader = RecordReader(root)
    for row in read_rows(files):
        try:
            good = _examine(row, reader, root)
        except BadRecordError:
            continue  # met again, and written down, by _write
        plan.setdefault(good.video, []).append((good.content, same.setdefault(good.frames, good.frames)))
    return plan


# ---- what its video shows -------------------------------------------------------------------------------------------


def _decode(
    plan: dict[str, list[tuple[str, Frames]]], decoder: dict[str, str], journal: Journal, workers: int
) -> Faults:
    """The verdict on every row of the plan, from the journal or, with an entry in it at once, from the decoder."""
    known = {row["key"]: Fault(row["fault"], row["reason"]) if row["fault"] else None for row in journal}
    faults: Faults = {}

    def pending() -> Iterator[Clip]:
        for video, rows in plan.items():
            mark, wanted = file_mark(video), {}
            for content, frames in rows:
                if (key := _key(decoder, mark, content)) in known:
                    faults[content] = known[key]
                else:
                    wanted[content] = frames
            if wanted:
                yield Clip(video, mark, wanted)

    chunk = max(1, min(_CHUNK, len(plan) // (4 * workers)))
    rows = sum(map(len, plan.values()))
    with (
        tqdm(total=rows, desc="checking", unit="row", disable=None) as bar,
        contextlib.closing(verdicts(pending(), decoder["backend"], workers, chunk)) as batches,
    ):
        for batch in batches:
            journal.append(
                {"key": _key(decoder, clip.mark, content), "video": clip.video, **_fields(fault)}
                for clip, found in batch
                for content, fault in found.items()
                if fault is None or fault.kind != "video_unreadable"
            )
            for _, found in batch:
                faults |= found
            bar.update(len(faults) - bar.n)
        bar.update(rows - bar.n)
    return faults


def _key(decoder: dict[str, str], mark: list[Any], content: str) -> str:
    return key_of(_VERSION, decoder, mark, content)


def _fields(fault: Fault | None) -> dict[str, str | None]:
    return {"fault": fault and fault.kind, "reason": fault and fault.reason}


# ---- final files ----------------------------------------------------------------------------------------------------


def _write(
    files: Sequence[Path], marks: list[list[Any]], root: str, out: Path, faults: Faults, decoder: dict[str, str]
) -> dict[str, Any]:
    """Read the rows again and part them; returns the summary."""
    rows, clean, kinds = Counter(), Counter(), Counter()  # by file, by file, by kind of fault
    videos: dict[str, int] = {}  # a bit for each frame of the pool that clean rows use
    changed = DataError(f"{', '.join(map(str, files))}: changed during the check. Run the same command again.")
    reader = RecordReader(root)
    with atomic_write(out / "clean.jsonl") as good_rows, atomic_write(out / "rejected.jsonl") as bad_rows:
        for row in read_rows(files, "writing"):
            file = row.source.rpartition(":")[0]
            rows[file] += 1
            try:
                good = _examine(row, reader, root)
                if good.content not in faults:
                    raise changed
                videos.setdefault(good.video, 0)
                if fault := faults[good.content]:
                    raise BadRecordError(row.source, good.id, fault.reason, fault.kind)
            except BadRecordError as error:
                kinds[error.kind] += 1
                bad_rows.write(_rejected(row, error))
                continue
            clean[file] += 1
            good_rows.write(good.line)
            videos[good.video] |= sum(1 << number for number in good.frames)
        if not rows:
            raise DataError(f"{', '.join(map(str, files))}: no record in it. Check that it is what was meant.")
        if [file_mark(file) for file in files] != marks:
            raise changed
        (out / "summary.json").unlink(missing_ok=True)
    summary = {
        "rows": rows.total(),
        "clean": clean.total(),
        "rejected": kinds.total(),
        "faults": {kind: kinds[kind] for kind in FAULTS if kinds[kind]},
        "files": [{"file": file, "rows": rows[file], "clean": clean[file]} for file in map(str, files)],
        "videos": {
            "root": root,
            "named": len(videos),
            "with_clean_rows": sum(frames > 0 for frames in videos.values()),
            "frames_decoded": sum(frames.bit_count() for frames in videos.values()),
        },
        "decoder": decoder,
    }
    with atomic_write(out / "summary.json") as file:
        file.write((json.dumps(summary, indent=1, ensure_ascii=False) + "\n").encode())
    return summary


def _rejected(row: Row, error: BadRecordError) -> bytes:
    value = row.value.doc.rstrip("\r\n") if isinstance(row.value, json.JSONDecodeError) else row.value
    line = {"source": row.source, "id": error.id, "fault": error.kind, "reason": error.reason, "row": value}
    return json_line(line, default=_as_text)


def _as_text(value: Any) -> str:
    return f"<{len(value)} bytes>" if isinstance(value, bytes) else str(value)
