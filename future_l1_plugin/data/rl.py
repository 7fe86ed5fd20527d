"""RL prompts: one question, what is shown with it, and what its answer is held against.

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
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from future_l1_plugin.data.frames import FrameCache, check_file, read_frames
from future_l1_plugin.data.prompts import ANSWER_IN_TAGS, multiple_choice_prompt
from future_l1_plugin.data.records import (
    CONTROL_TOKENS,
    IMAGE,
    MEDIA_TOKENS,
    BadRecord,
    BadRecordError,
    TwiffRecord,
    token_fault,
)
from future_l1_plugin.data.sft import processor_media, question_text, question_video, read_picture, user_content
from future_l1_plugin.data.sources import SUFFIXES, Row, read_rows
from future_l1_plugin.errors import ConfigError, DataError
from future_l1_plugin.rewards.answer import option_letter

KINDS = ("choice", "maths", "text")
QUESTION_TYPES = ("hop1", "hop2", "hop3", "hop5")
LETTERS = ("A", "B", "C", "D")  # of FutureBench; the others may have more or fewer
_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_OPTION_LINE = re.compile(r"^[ \t]*\(?([A-Z])[.):][ \t]+(\S.*?)[ \t]*$", re.MULTILINE)
_SHOWN = 10  # bad rows that an error lists
_PLAIN = ("id", "question", "answer", "images", "options", "kind")

VideoRoot = str | os.PathLike | Mapping[str, str] | None


@dataclass(frozen=True)
class RlPrompt:
    """One prompt.

    Attributes:
        id: unique over all files that were read together.
        question: the text that the model reads; with "images", each `<image>` in it is a place for one.
        media: "images" | "video" | "none".
        video: path of the clip whose frames are shown (as images or as a video); None without one.
        pool: pool numbers 1..8 of the frames shown (TwiFF); None for other schemas.
        num_frames: how many evenly spread frames are shown (FutureBench); None for other schemas.
        images: paths of the pictures shown (plain).
        ground_truth: the right answer as it was written: an option's letter or its text, a number, a sentence.
        options: option letter -> option text of a multiple-choice question; else None.
        kind: "choice" | "maths" | "text": how an answer is compared. "choice" has options, and the ground truth names
            one of them (`rewards.answer.option_letter` tells which).
        source: name for metrics: "twiff", "futurebench/hop1" .., "plain/NAME_OF_FILE".
    """

    id: str
    question: str
    media: Literal["images", "video", "none"]
    ground_truth: str
    source: str
    kind: Literal["choice", "maths", "text"] = "text"
    options: dict[str, str] | None = None
    video: str | None = None
    pool: tuple[int, ...] | None = None
    num_frames: int | None = None
    images: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The prompt as JSON values. `from_dict` reads back an equal prompt."""
        row = asdict(self)
        return row | {"pool": None if self.pool is None else list(self.pool), "images": list(self.images)}

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> "RlPrompt":
        """Raises DataError for fields that a prompt does not have, or lacks."""
        names = [item.name for item in fields(cls)]
        if set(row) != set(names):
            raise DataError(f"expected a prompt with the fields {', '.join(names)}; found {', '.join(map(str, row))}")
        row = dict(row)
        row["pool"] = None if row["pool"] is None else tuple(row["pool"])
        row["images"] = tuple(row["images"])
        return cls(**row)


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
    reader = _Reader(question_media, num_frames)
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
    shown = "".join(f"\n  {item.source} (id {item.id}): {item.reason}" for item in bad[:_SHOWN])
    more = f"\n  and {len(bad) - _SHOWN:,} more" if len(bad) > _SHOWN else ""
    way_on = f" Fix them, or go on with the other {good:,} by `on_bad: skip`." if good else " Fix them."
    return DataError(f"{start}{len(bad):,} of {count:,} prompts are bad.{way_on}{shown}{more}")


def _rows(path: Path) -> list[Row]:
    if not path.is_file():
        raise DataError(f"{path}: no such file of prompts. Check the path.")
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(
            f"{path}: cannot tell its format, expected a name that ends in {', '.join(SUFFIXES)}. Rename it."
        )
    rows = list(read_rows([path]))
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
            row = _present(row.value)
            if schema := _schema(row):
                return schema
            found |= dict.fromkeys(map(str, row))
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


def _present(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row without what is None: parquet files hold every column in every row."""
    return {key: value for key, value in row.items() if value is not None}


class _Reader:
    """Turns rows into prompts, and remembers ids and files over all of them."""

    def __init__(self, question_media: str, num_frames: int) -> None:
        self._question_media, self._num_frames = question_media, num_frames
        self._taken: dict[str, str] = {}  # id -> where it stands
        self._faults: dict[str, str | None] = {}  # of each media file, asked once

    def read(self, given: Row, schema: str, path: Path, root: Path) -> RlPrompt:
        """One row. Raises BadRecordError."""
        source, row = given.source, given.value
        if isinstance(row, ValueError):  # of a JSONL line
            raise BadRecordError(source, "-", f"not JSON ({row.msg}, column {row.colno}). Write the line again.")
        if not isinstance(row, Mapping):
            raise BadRecordError(source, "-", f"a row is an object with named fields, found {type(row).__name__}")
        row = _present(row)
        id = str(row.get("id", "")) or Path(source).name

        def bad(reason: str) -> BadRecordError:
            return BadRecordError(source, id, reason)

        if (own := _schema(row)) not in (schema, None):
            raise bad(f"the row has the fields of the {own} schema, its file began with {schema}. Split the file.")
        if schema == "twiff":
            prompt = self._twiff(TwiffRecord.from_dict(row, root, source), bad)
        elif schema == "futurebench":
            prompt = self._futurebench(row, id, root, bad)
        else:
            prompt = _plain(row, id, path, bad)
        fault = token_fault("the question", prompt.question, MEDIA_TOKENS)
        fault = fault or token_fault("the answer", prompt.ground_truth, CONTROL_TOKENS)
        fault = fault or self._media_fault(prompt)
        if prompt.id in self._taken:
            fault = f"the id is taken by {self._taken[prompt.id]}. Ids must differ, over all files."
        if fault:
            raise bad(fault)
        self._taken[prompt.id] = source
        return prompt

    def _twiff(self, record: TwiffRecord, bad: Callable[[str], BadRecordError]) -> RlPrompt:
        if not record.image:
            raise bad(
                "the question shows no frame (`image` is empty). Name frames of the pool, 1..8; a question about the "
                "whole clip belongs in a FutureBench file, one without pictures in a plain one."
            )
        prompt = twiff_prompt(record, self._question_media)
        _check_choice(record.answer, prompt.options, bad)
        return prompt

    def _futurebench(self, row: dict[str, Any], id: str, root: Path, bad: Callable[[str], BadRecordError]) -> RlPrompt:
        if missing := [key for key in ("id", "video_path", "question_type", "qa") if row.get(key) in (None, "")]:
            raise bad(f"lacks {', '.join(missing)}. Add the field.")
        path, question_type, qa = row["video_path"], row["question_type"], row["qa"]
        if not isinstance(path, str):
            raise bad(f"video_path: expected text, found {path!r}")
        if question_type not in QUESTION_TYPES:
            raise bad(f"question_type: expected one of {', '.join(QUESTION_TYPES)}, found {question_type!r}")
        if not isinstance(qa, Mapping):
            raise bad(f"qa: expected an object with Question, Options and Answer, found {type(qa).__name__}")
        question, options, answer = qa.get("Question"), qa.get("Options"), qa.get("Answer")
        if not isinstance(question, str) or not question.strip():
            raise bad(f"qa.Question: expected text, found {question!r}")
        options = _present(options) if isinstance(options, Mapping) else options
        if not isinstance(options, dict) or sorted(options) != list(LETTERS):
            found = sorted(options) if isinstance(options, dict) else options
            raise bad(f"qa.Options: expected the options {', '.join(LETTERS)}, found {found!r}")
        if not isinstance(answer, str) or answer.strip().upper() not in LETTERS:
            raise bad(f"qa.Answer: expected one of {', '.join(LETTERS)}, found {answer!r}")
        options = {letter: str(options[letter]) for letter in LETTERS}
        inside = path.rsplit("video_dataset/", 1)[-1].lstrip("/")
        return RlPrompt(
            id=id,
            question=multiple_choice_prompt(question, options, post=ANSWER_IN_TAGS),
            media="video",
            video=str(root / inside),
            num_frames=self._num_frames,
            ground_truth=answer.strip().upper(),
            options=options,
            kind="choice",
            source=f"futurebench/{question_type}",
        )

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


def twiff_prompt(record: TwiffRecord, question_media: Literal["images", "video"], future: bool = False) -> RlPrompt:
    """A record's question, with the frames that it shows.

    Args:
        record: its answer is the ground truth; its reasoning is not used, but for
        future: True shows the frames of the reasoning as well, behind those of the question (curation by visual gain).
    """
    text = record.question
    if future and question_media == "images":
        *before, last = text.split(IMAGE)
        shown = "".join(f"\nframe_{number}\n{IMAGE}" for number in record.reasoning_image)
        text = f"{IMAGE.join(before)}{IMAGE}{shown}{last}" if before else shown.lstrip("\n") + "\n" + text
    question = question_text(text, question_media)
    options = listed_options(question)
    return RlPrompt(
        id=record.id,
        question=question,
        media=question_media,
        video=record.video,
        pool=(*record.image, *(record.reasoning_image if future else ())),
        ground_truth=record.answer,
        options=options,
        kind="choice" if options else "text",
        source="twiff",
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


def _plain(row: dict[str, Any], id: str, path: Path, bad: Callable[[str], BadRecordError]) -> RlPrompt:
    absent = [key for key in _PLAIN if key not in row]
    for key in row:
        # Other fields are the user's own; one that looks like ours would change what is asked without a word.
        if key not in _PLAIN and (near := difflib.get_close_matches(str(key), absent, n=1, cutoff=0.8)):
            raise bad(f"unknown field `{key}`. Did you mean `{near[0]}`? Fields are {', '.join(_PLAIN)}.")
    question, answer = row.get("question"), row.get("answer")
    if not isinstance(question, str) or not question.replace(IMAGE, "").strip():
        raise bad(f"question: expected text, found {question!r}")
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = str(answer)
    if not isinstance(answer, str) or not answer.strip():
        raise bad(f"answer: expected text or a number, found {answer!r}")
    images = row.get("images", [])
    if not isinstance(images, Sequence) or isinstance(images, str) or not all(isinstance(i, str) for i in images):
        raise bad(f"images: expected a list of paths, found {images!r}")
    if (places := question.count(IMAGE)) not in (0, len(images)):
        raise bad(
            f"the question has {places} `{IMAGE}` and `images` has {len(images)} paths. Make them equal, or remove "
            f"every `{IMAGE}` to put the pictures in front."
        )
    options = _options(row["options"], bad) if "options" in row else None
    listed = listed_options(question)
    if options and listed and options != listed:
        raise bad(f"`options` {options} differ from those that the question lists, {listed}. Remove one of the two.")
    kind = row.get("kind", "choice" if options or listed else "text")
    if kind not in KINDS:
        raise bad(f"kind: expected one of {', '.join(KINDS)}, found {kind!r}")
    if kind == "choice" and not (options or listed):
        raise bad("kind is choice, and there are no options. Give `options`, or another kind.")
    if kind != "choice":
        if options:
            raise bad(f"kind is {kind}, and there are `options`, which only kind choice has. Remove one of the two.")
        listed = None
    if options and not listed:
        question = multiple_choice_prompt(question, options, post=ANSWER_IN_TAGS)
    options = options or listed
    _check_choice(answer, options, bad)
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


def _options(options: Any, bad: Callable[[str], BadRecordError]) -> dict[str, str]:
    if isinstance(options, Sequence) and not isinstance(options, str):
        options = dict(zip(_ALPHABET, options, strict=False)) if len(options) <= len(_ALPHABET) else None
    options = _present(options) if isinstance(options, Mapping) else {}
    if len(options) < 2 or "".join(sorted(map(str, options))) != _ALPHABET[: len(options)]:
        raise bad("options: expected two or more, as {A: text, B: text, ..} without gaps or as a list of texts")
    return {letter: str(options[letter]) for letter in sorted(options)}


def _check_choice(answer: str, options: dict[str, str] | None, bad: Callable[[str], BadRecordError]) -> None:
    if options and option_letter(answer, options) is None:
        raise bad(
            f"the answer {answer!r} is none of the options {options}. Correct it; in a question that is not multiple "
            'choice, let no lines begin with "A. ", "B. ".'
        )


def listed_options(question: str) -> dict[str, str] | None:
    """Options that a question lists as lines `A. text`, `B. text`, .. (also `A) text`, `(A) text`, `A: text`).

    None unless the letters of all such lines are A, B, .. in this order, two or more.
    """
    lines = _OPTION_LINE.findall(question)
    letters = "".join(letter for letter, _ in lines)
    return dict(lines) if len(lines) >= 2 and letters == _ALPHABET[: len(letters)] else None


# ---- showing --------------------------------------------------------------------------------------------------------


def chat_messages(prompt: RlPrompt) -> list[dict[str, Any]]:
    """The conversation for a chat template: one user turn whose content is a list of {"type": "text", "text": ..} and
    places for media, {"type": "video"} or {"type": "image"}. No path and no pixel is in it."""
    if prompt.media == "none":
        return [{"role": "user", "content": [{"type": "text", "text": prompt.question}]}]
    images = len(prompt.images) if prompt.pool is None else len(prompt.pool)
    return [{"role": "user", "content": user_content(prompt.question, prompt.media, images)}]


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as the model takes it.

    Attributes:
        prompt_ids: token ids, each image or frame already as many pad tokens as it has vision features.
        inputs: everything else that the processor returned, batch dimension 1 where it has one: pixel_values,
            image_grid_thw, pixel_values_videos, video_grid_thw, mm_token_type_ids Long (1, P) and the like; neither
            input_ids nor attention_mask.
    """

    prompt_ids: list[int]
    inputs: dict[str, Tensor]


def encode_prompt(prompt: RlPrompt, processor: Any, cache: FrameCache | None = None) -> EncodedPrompt:
    """Decode what the prompt shows and run the processor.

    Args:
        prompt: what `load_prompts` returned.
        processor: Qwen3-VL's, with the chat template of a latent checkpoint.
        cache: decoded frames kept in memory. None: every call decodes.

    Raises:
        DataError: a video or picture that cannot be read, or that the processor refuses. Names the prompt.
    """
    text = processor.apply_chat_template(chat_messages(prompt), tokenize=False, add_generation_prompt=True)
    try:
        encoded = processor(text=[text], return_tensors="pt", **_media(prompt, processor, cache))
    except DataError as error:
        raise DataError(f"prompt {prompt.id}: {error}") from error
    except ValueError as error:  # smaller than a patch, or an extreme aspect ratio
        raise DataError(f"prompt {prompt.id}: the processor refuses its images or video: {error}") from error
    inputs = {name: value for name, value in encoded.items() if isinstance(value, Tensor)}
    prompt_ids = inputs.pop("input_ids")[0].tolist()
    inputs.pop("attention_mask")
    return EncodedPrompt(prompt_ids, inputs)


def _media(prompt: RlPrompt, processor: Any, cache: FrameCache | None) -> dict[str, Any]:
    if prompt.media == "none":
        return {}
    if prompt.images:
        return processor_media(images=[read_picture(path) for path in prompt.images])
    read = read_frames if cache is None else cache.read
    clip = read(prompt.video, num_frames=prompt.num_frames, pool=prompt.pool)
    if prompt.media == "images":
        return processor_media(images=list(clip.frames))
    if prompt.pool is None:
        return processor_media(videos=[(clip.frames, clip.metadata())])
    return processor_media(videos=[question_video(clip, processor.video_processor.temporal_patch_size)])
