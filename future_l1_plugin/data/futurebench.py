"""FutureBench items: read, checked and asked in one way, for RL, evaluation and the micro world. Loads no torch.

An item, as in futurebench.json of haonan3/V1-33K:

    {"id": .., "video_path": "..video_dataset/a/b.mp4", "question_type": "hop1" | "hop2" | "hop3" | "hop5",
     "qa": {"Question": .., "Options": {"A": .., "B": .., "C": .., "D": ..}, "Answer": "B"}}

hop5 is interpolation: what happened in a gap. A file is .json (a list, or {"data": list}), .jsonl or .parquet.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from future_l1_plugin.data.sources import Row, RowFault, data_files, listed, named_fields, read_rows
from future_l1_plugin.errors import DataError

QUESTION_TYPES = ("hop1", "hop2", "hop3", "hop5")
LETTERS = ("A", "B", "C", "D")
#: What a latent-aware model is asked for after the options.
ANSWER_IN_TAGS = "\nPut only the option letter within <answer></answer>."


def multiple_choice_prompt(question: str, options: Mapping[str, str], pre: str = "", post: str = "") -> str:
    """The prompt of a multiple-choice question: pre + question + one line for each option + post.

    Options already written inside the question (recognised by "A)" and "D)", as part of FutureBench does) are not
    written again.
    """
    if "A)" in question and "D)" in question:
        return f"{pre}{question}{post}"
    lines = "".join(f"\n{letter}. {text}" for letter, text in sorted(options.items()))
    return f"{pre}{question}{lines}{post}"


@dataclass(frozen=True)
class FutureBenchItem:
    """One item.

    Attributes:
        video_path: as the file has it; `video_file` says where that is.
        options: the text of each of `LETTERS`.
        answer: the letter of the right one.
    """

    id: str
    video_path: str
    question_type: str
    question: str
    options: dict[str, str]
    answer: str

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> "FutureBenchItem":
        """Read an item; what is None counts as absent, other fields than the schema's are left out. Raises RowFault."""
        if missing := [key for key in ("id", "video_path", "question_type", "qa") if row.get(key) in (None, "")]:
            raise RowFault(f"lacks {', '.join(missing)}. Add the field.")
        path, question_type, qa = row["video_path"], row["question_type"], row["qa"]
        if not isinstance(path, str):
            raise RowFault(f"video_path: expected text, found {path!r}")
        if question_type not in QUESTION_TYPES:
            raise RowFault(f"question_type: expected one of {', '.join(QUESTION_TYPES)}, found {question_type!r}")
        if not isinstance(qa, Mapping):
            raise RowFault(f"qa: expected an object with Question, Options and Answer, found {type(qa).__name__}")
        question, options, answer = qa.get("Question"), qa.get("Options"), qa.get("Answer")
        if not isinstance(question, str) or not question.strip():
            raise RowFault(f"qa.Question: expected text, found {question!r}")
        if isinstance(options, Mapping):  # a parquet column has every letter that any row has
            options = {letter: text for letter, text in options.items() if text is not None}
        if not isinstance(options, dict) or sorted(options) != list(LETTERS):
            found = sorted(options) if isinstance(options, dict) else options
            raise RowFault(f"qa.Options: expected the options {', '.join(LETTERS)}, found {found!r}")
        if not isinstance(answer, str) or answer.strip().upper() not in LETTERS:
            raise RowFault(f"qa.Answer: expected one of {', '.join(LETTERS)}, found {answer!r}")
        return cls(
            id=str(row["id"]),
            video_path=path,
            question_type=question_type,
            question=question,
            options={letter: str(options[letter]) for letter in LETTERS},
            answer=answer.strip().upper(),
        )

    def to_dict(self) -> dict[str, Any]:
        """The item in the schema above. `from_dict` reads back an equal one."""
        return {
            "id": self.id,
            "video_path": self.video_path,
            "question_type": self.question_type,
            "qa": {"Question": self.question, "Options": dict(self.options), "Answer": self.answer},
        }

    def prompt(self, pre: str = "", post: str = ANSWER_IN_TAGS) -> str:
        """The question as a model reads it, with its options."""
        return multiple_choice_prompt(self.question, self.options, pre, post)

    def video_file(self, root: str | os.PathLike) -> Path:
        """Where its clip lies: the part of `video_path` after "video_dataset/", below `root`."""
        return Path(root).expanduser() / self.video_path.rsplit("video_dataset/", 1)[-1].lstrip("/")


def load_items(file: str | os.PathLike, source: str | None = None) -> list[FutureBenchItem]:
    """Every item of a file.

    Args:
        source: what to call the file in errors; None = its path.

    Raises DataError: no such file, no rows, or faulty items: counts them and lists the first ten.
    """
    source = source or str(file)
    items, faults, taken = [], [], {}
    for row in read_rows(data_files(file)):
        try:
            item = FutureBenchItem.from_dict(named_fields(row.value))
            if item.id in taken:
                raise RowFault(f"its id is also that of {taken[item.id]}")
        except RowFault as fault:
            faults.append(f"{_name(row)}: {fault}")
            continue
        taken[item.id] = row.unnamed
        items.append(item)
    if faults:
        count = len(items) + len(faults)
        raise DataError(f"{source}: {len(faults):,} of {count:,} items are faulty. Fix or remove them.{listed(faults)}")
    if not items:
        raise DataError(f"{source}: holds no items")
    return items


def _name(row: Row) -> str:
    has_id = isinstance(row.value, Mapping) and row.value.get("id") not in (None, "")
    return f"{row.unnamed} (id {row.value['id']})" if has_id else row.unnamed
