"""Files of RL prompts (`prompt.RlPrompt`): questions with their reference answers.

Three schemas are read, each file in one of them, which is told from its fields:

| schema      | told by                  | shown                                                | answer               |
|-------------|--------------------------|------------------------------------------------------|----------------------|
| TwiFF       | `conversations`, `video` | pool frames of the clip, as images or as one video   | letter, option, text |
| FutureBench | `qa`, `video_path`       | `num_frames` frames of the clip, evenly spread       | letter               |
| plain       | `question`, `answer`     | pictures (`images`), or nothing                      | any                  |

TwiFF rows come in the three spellings of `records.py` and are shown as in SFT, their reasoning is not used. FutureBench
items are asked and shown as the futurebench task of lmms-eval does it. Where frames are the same they are so to the
pixel: all three go through `read_frames` and `processor_media`.

A plain row: {"id": .., "question": .., "answer": text or number, "images": [paths], "options": {"A": ..} or [..],
"kind": ..}; all but question and answer may be left out. Paths are relative to the file. Each `<image>` of the question
stands for one picture, in order; without any, the pictures come first. Options are written below the question and a
letter is asked for, as FutureBench does; a question that lists them itself stays as it is.

Options that a TwiFF or plain question lists as lines "A. ..", "B. ..", .. are read from it, so that a letter and the
option's text both count.
"""

import difflib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from future_l1_plugin.data.container import check_file
from future_l1_plugin.data.frame_choice import Evenly, FrameChoice
from future_l1_plugin.data.futurebench import ANSWER_IN_TAGS, FutureBenchItem, multiple_choice_prompt
from future_l1_plugin.data.prompt import (
    ALPHABET,
    EncodedPrompt,
    RlPrompt,
    encode_prompt,
    listed_options,
    twiff_prompt,
)
from future_l1_plugin.data.record_files import BadRecord
from future_l1_plugin.data.records import CONTROL_TOKENS, IMAGE, MEDIA_TOKENS, BadRecordError, TwiffRecord, token_fault
from future_l1_plugin.data.sources import Row, RowFault, data_files, listed, named_fields, read_rows
from future_l1_plugin.errors import ConfigError, DataError
from future_l1_plugin.rewards.answer import option_letter

#: What users' scripts take from here.
__all__ = ["EncodedPrompt", "Prompts", "RlPrompt", "encode_prompt", "load_prompts"]

KINDS = ("choice", "maths", "text")
_PLAIN = ("id", "question", "answer", "images", "options", "kind")

VideoRoot = str | os.PathLike | Mapping[str, str] | None


class Prompts(list[RlPrompt]):
    """The good prompts, in the order of the files; `bad` lists the rows that were left out, and why."""

    def __init__(self, prompts: Iterable[RlPrompt] = (), bad: Iterable[BadRecord] = ()) -> None:
        super().__init__(prompts)
        self.bad = list(bad)


# ---- reading --------------------------------------------------------------------------------------------------------


def load_prompts(
    files: str | os.PathLike | Sequence[str | os.PathLike],
    video_root: VideoRoot = None,
    question_media: Literal["images", "video"] = "images",
    num_frames: int = 32,
    on_bad: Literal["raise", "skip"] = "raise",
    limit: int | None = None,
) -> Prompts:
    """Read files of prompts: .json (a list, or {"data": list}), .jsonl or .parquet, in any of the three schemas.

    Args:
        files: one file or several; each may have its own schema.
        video_root: folder that relative video paths are joined to (FutureBench: the part after `video_dataset/`). One
            folder for all files, or a mapping from file (as in `files`) to folder, which plain files need not be in.
            None: `videos` beside the file if there is such a folder, else the folder of the file.
        question_media: how the question frames of TwiFF rows are shown.
        num_frames: frames of a FutureBench clip; a shorter clip gives all it has.
        on_bad: "raise" reads to the end and then raises one error that counts all bad rows and lists the first ten;
            "skip" leaves them out and lists them in `.bad`.
        limit: stop after so many good prompts.

    Bad are: rows of another schema than their file's, with faulty or missing fields; an id that is taken, in whichever
    file; a video that is missing, empty or cut off; a picture that is missing or is none; an answer that is none of the
    options; a question that spells media tokens, an answer that spells any control token. No pixel is decoded.

    Raises:
        DataError: no such file; a file that cannot be parsed, or in which no row has a known schema; bad rows; with
            "skip", a file without a good prompt.
        ConfigError: an argument with another value, or a file that `video_root` lacks.
    """
    _check_arguments(question_media, num_frames, on_bad, limit)
    files = [files] if isinstance(files, str | os.PathLike) else list(files)
    if not files:
        raise ConfigError("no file of prompts is given. Name at least one.")
    reader = _Reader(question_media, Evenly(num_frames))
    good: list[RlPrompt] = []
    bad: list[BadRecord] = []
    count = 0
    for name in files:
        if limit is not None and len(good) >= limit:
            break
        path, before = Path(name), count
        rows = _rows(path)
        schema = _schema_of_file(path, rows)
        root = path.parent if schema == "plain" else _root(name, video_root)
        so_far = len(good)
        for row in rows:
            if limit is not None and len(good) >= limit:
                break
            count += 1
            try:
                good.append(reader.read(row, schema, path, root))
            except BadRecordError as error:
                bad.append(BadRecord(error.source, error.id, error.reason))
        if on_bad == "skip" and len(good) == so_far and count > before:
            raise bad_prompts_error(bad[-(count - before) :], count - before, 0, f"{path}: ")
    if bad and on_bad == "raise":
        raise bad_prompts_error(bad, count, len(good))
    return Prompts(good, bad)


def _check_arguments(question_media: Any, num_frames: Any, on_bad: Any, limit: Any) -> None:
    if question_media not in ("images", "video"):
        raise ConfigError(f"question_media: expected images or video, found {question_media!r}")
    if on_bad not in ("raise", "skip"):
        raise ConfigError(f"on_bad: expected raise or skip, found {on_bad!r}")
    if not isinstance(num_frames, int) or num_frames < 1:
        raise ConfigError(f"num_frames: expected a whole number, at least 1, found {num_frames!r}")
    if limit is not None and limit < 1:
        raise ConfigError(f"limit: expected at least 1, or None for all prompts, found {limit!r}")


def bad_prompts_error(bad: list[BadRecord], count: int, good: int, start: str = "") -> DataError:
    """One error for all bad prompts of `count`: the first ten, and what to do."""
    way_on = f" Fix them, or go on with the other {good:,} by `on_bad: skip`." if good else " Fix them."
    shown = listed([f"{item.source} (id {item.id}): {item.reason}" for item in bad])
    return DataError(f"{start}{len(bad):,} of {count:,} prompts are bad.{way_on}{shown}")


def _rows(path: Path) -> list[Row]:
    if not path.is_file():
        raise DataError(f"{path}: no such file of prompts. Check the path.")
    rows = list(read_rows(data_files(path)))
    if not rows:
        raise DataError(f"{path}: holds no row. Check that it is the file that was meant.")
    return rows


def _root(name: str | os.PathLike, video_root: VideoRoot) -> Path:
    if video_root is None:
        beside = Path(name).parent / "videos"
        return beside if beside.is_dir() else Path(name).parent
    if not isinstance(video_root, Mapping):
        return Path(video_root)
    for file, root in video_root.items():
        if file == os.fspath(name) or Path(file).resolve() == Path(name).resolve():
            return Path(root)
    known = ", ".join(map(str, video_root)) or "nothing"
    raise ConfigError(f"video_root: {name} is not in it; it has folders for {known}. Add the file with its folder.")


def _schema_of_file(path: Path, rows: list[Row]) -> str:
    """The schema of the first row that has one."""
    found: dict[str, None] = {}
    for row in rows:
        if isinstance(row.value, Mapping):
            fields = named_fields(row.value)
            if schema := _schema(fields):
                return schema
            found |= dict.fromkeys(map(str, fields))
    raise DataError(
        f"{path}: of no known schema. Expected the fields of a TwiFF record (conversations, video, image, answer), of "
        "a FutureBench item (id, video_path, question_type, qa) or of a plain row (question, answer, and maybe "
        f"id, images, options, kind); found {', '.join(list(found)[:20]) or 'no row with named fields'}."
    )


def _schema(row: Mapping[str, Any]) -> str | None:
    if "qa" in row or "video_path" in row:
        return "futurebench"
    if "conversations" in row or "video" in row:
        return "twiff"
    return "plain" if "question" in row and "answer" in row else None


class _Reader:
    """Turns rows into prompts, and remembers ids and files over all of them."""

    def __init__(self, question_media: str, frames: FrameChoice) -> None:
        self._question_media, self._frames = question_media, frames
        self._taken: dict[str, str] = {}  # id -> where it stands
        self._faults: dict[str, str | None] = {}  # of each media file, asked once

    def read(self, row: Row, schema: str, path: Path, root: Path) -> RlPrompt:
        """One row. Raises BadRecordError."""
        id = "-"
        try:
            fields = named_fields(row.value)
            id = str(fields.get("id", "")) or Path(row.source).name
            prompt = self._prompt(fields, id, schema, path, root, row.source)
            self._check(prompt)
        except RowFault as fault:
            raise BadRecordError(row.source, id, str(fault), fault.kind) from fault
        self._taken[prompt.id] = row.source
        return prompt

    def _prompt(self, fields: dict[str, Any], id: str, schema: str, path: Path, root: Path, source: str) -> RlPrompt:
        if (own := _schema(fields)) not in (schema, None):
            raise RowFault(f"the row has the fields of the {own} schema, its file began with {schema}. Split the file.")
        if schema == "twiff":
            return _twiff(TwiffRecord.from_dict(fields, root, source), self._question_media)
        if schema == "futurebench":
            return _futurebench(FutureBenchItem.from_dict(fields), root, self._frames)
        return _plain(fields, id, path)

    def _check(self, prompt: RlPrompt) -> None:
        """Raises RowFault."""
        fault = token_fault("the question", prompt.question, MEDIA_TOKENS)
        fault = fault or token_fault("the answer", prompt.ground_truth, CONTROL_TOKENS)
        fault = fault or self._media_fault(prompt)
        if prompt.id in self._taken:
            fault = f"the id is taken by {self._taken[prompt.id]}. Ids must differ, over all files."
        if fault:
            raise RowFault(fault)

    def _media_fault(self, prompt: RlPrompt) -> str | None:
        for file, check in [(prompt.video, check_file), *((image, _check_picture) for image in prompt.images)]:
            if file is not None and file not in self._faults:
                try:
                    check(file)
                    self._faults[file] = None
                except DataError as error:
                    self._faults[file] = str(error)
            if file is not None and self._faults[file]:
                return self._faults[file]
        return None


def _twiff(record: TwiffRecord, question_media: Literal["images", "video"]) -> RlPrompt:
    if not record.image:
        raise RowFault(
            "the question shows no frame (`image` is empty). Name frames of the pool, 1..8; a question about the "
            "whole clip belongs in a FutureBench file, one without pictures in a plain one."
        )
    prompt = twiff_prompt(record, question_media)
    _check_choice(record.answer, prompt.options)
    return prompt


def _futurebench(item: FutureBenchItem, root: Path, frames: FrameChoice) -> RlPrompt:
    return RlPrompt(
        id=item.id,
        question=item.prompt(),
        media="video",
        video=str(item.video_file(root)),
        frames=frames,
        ground_truth=item.answer,
        options=item.options,
        kind="choice",
        source=f"futurebench/{item.question_type}",
    )


def _check_picture(path: str) -> None:
    """Reads the header only."""
    if not os.path.isfile(path):
        raise DataError(f"{path}: no such picture. Check the path; it is relative to the file of prompts.")
    from PIL import Image

    try:
        Image.open(path).close()
    except OSError as error:
        raise DataError(f"{path}: cannot be read as an image ({error}). Write it again.") from error


def _plain(row: dict[str, Any], id: str, path: Path) -> RlPrompt:
    absent = [key for key in _PLAIN if key not in row]
    for key in row:
        # Other fields are the user's own; one that looks like ours would change what is asked without a word.
        if key not in _PLAIN and (near := difflib.get_close_matches(str(key), absent, n=1, cutoff=0.8)):
            raise RowFault(f"unknown field `{key}`. Did you mean `{near[0]}`? Fields are {', '.join(_PLAIN)}.")
    question, answer = row.get("question"), row.get("answer")
    if not isinstance(question, str) or not question.replace(IMAGE, "").strip():
        raise RowFault(f"question: expected text, found {question!r}")
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = str(answer)
    if not isinstance(answer, str) or not answer.strip():
        raise RowFault(f"answer: expected text or a number, found {answer!r}")
    images = row.get("images", [])
    if not isinstance(images, Sequence) or isinstance(images, str) or not all(isinstance(i, str) for i in images):
        raise RowFault(f"images: expected a list of paths, found {images!r}")
    if (places := question.count(IMAGE)) not in (0, len(images)):
        raise RowFault(
            f"the question has {places} `{IMAGE}` and `images` has {len(images)} paths. Make them equal, or remove "
            f"every `{IMAGE}` to put the pictures in front."
        )
    options = _options(row["options"]) if "options" in row else None
    in_text = listed_options(question)
    if options and in_text and options != in_text:
        raise RowFault(
            f"`options` {options} differ from those that the question lists, {in_text}. Remove one of the two."
        )
    kind = row.get("kind", "choice" if options or in_text else "text")
    if kind not in KINDS:
        raise RowFault(f"kind: expected one of {', '.join(KINDS)}, found {kind!r}")
    if kind == "choice" and not (options or in_text):
        raise RowFault("kind is choice, and there are no options. Give `options`, or another kind.")
    if kind != "choice":
        if options:
            raise RowFault(f"kind is {kind}, and there are `options`, which only choice has. Remove one of the two.")
        in_text = None
    if options and not in_text:
        question = multiple_choice_prompt(question, options, post=ANSWER_IN_TAGS)
    options = options or in_text
    _check_choice(answer, options)
    return RlPrompt(
        id=id,
        question=question,
        media="images" if images else "none",
        images=tuple(os.path.join(path.parent, image) for image in images),
        ground_truth=answer.strip(),
        options=options,
        kind=kind,
        source=f"plain/{path.stem}",
    )


def _options(options: Any) -> dict[str, str]:
    if isinstance(options, Sequence) and not isinstance(options, str):
        options = dict(zip(ALPHABET, options, strict=False)) if len(options) <= len(ALPHABET) else None
    options = named_fields(options) if isinstance(options, Mapping) else {}
    if len(options) < 2 or "".join(sorted(map(str, options))) != ALPHABET[: len(options)]:
        raise RowFault("options: expected two or more, as {A: text, B: text, ..} without gaps or as a list of texts")
    return {letter: str(options[letter]) for letter in sorted(options)}


def _check_choice(answer: str, options: dict[str, str] | None) -> None:
    if options and option_letter(answer, options) is None:
        raise RowFault(
            f"the answer {answer!r} is none of the options {options}. Correct it; in a question that is not multiple "
            'choice, let no lines begin with "A. ", "B. ".'
        )
