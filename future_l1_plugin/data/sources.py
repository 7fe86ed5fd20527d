"""Where rows come from: a file, a folder, or a dataset of the Hugging Face hub.

| DATA                          | its files                                                                            |
|-------------------------------|--------------------------------------------------------------------------------------|
| `rows.jsonl`                  | that file: .json (a list, or {"data": list}), .jsonl or .parquet                     |
| `folder`                      | all such files in it and below, in the order of their paths                          |
| `org/name[:split][@revision]` | those of that dataset, downloaded; of one split the files that have it as a word of  |
|                               | their path, as in `data/train-00000.parquet`                                         |

In folders and datasets, hidden files are left out, and .json files that hold no list of rows (`dataset_infos.json`).
Linked folders are not entered. A file or folder that exists comes before a dataset of the same name.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from future_l1_plugin.errors import DataError, EnvironmentMismatch

SUFFIXES = (".json", ".jsonl", ".parquet")
_KINDS = ", ".join(SUFFIXES)
_SHOWN = 10  # entries of a list in an error
_LONG = 2_000  # rows; shorter files are read before a progress bar would be seen
_DATASET = re.compile(r"(?P<id>\w[\w.-]*/[\w.-]+)(:(?P<split>[\w.-]+))?(@(?P<revision>[\w./-]+))?", re.ASCII)


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def data_files(data: str | os.PathLike) -> list[Path]:
    """The files of rows that `data` stands for, one or more, each of a known format; see above.

    Raises:
        DataError: neither there nor on the hub, hub out of reach, a format that is not known, or no file of rows.
    """
    path = Path(data)
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise DataError(f"{path}: cannot tell its format, expected a name that ends in {_KINDS}. Rename it.")
        return [path]
    if path.is_dir():
        files = _files_below(path)
        if not files:
            raise DataError(f"{path}: no file of records in this folder, expected some that end in {_KINDS}.")
        return files
    if dataset := _dataset(data):
        return _download(dataset["id"], dataset["split"], dataset["revision"])
    raise DataError(f"{path}: no such file of records. Check the path.")


def is_dataset(data: str | os.PathLike) -> bool:
    """Whether `data` names a dataset of the hub. Asks nobody: that dataset need not exist."""
    return not Path(data).exists() and _dataset(data) is not None


def _dataset(data: str | os.PathLike) -> re.Match | None:
    parts = _DATASET.fullmatch(os.fspath(data))
    return parts if parts and Path(parts["id"]).suffix.lower() not in SUFFIXES else None


def short_names(files: Sequence[Path]) -> list[str]:
    """The name of each file, with as many of its folders as tell it from the others: a/rows.jsonl, b/rows.jsonl."""
    names = []
    for file in files:
        length = 1
        while length < len(file.parts) and sum(file.parts[-length:] == f.parts[-length:] for f in files) > 1:
            length += 1
        names.append("/".join(file.parts[-length:]))
    return names


def _files_below(folder: Path) -> list[Path]:
    found = []
    for place, folders, names in os.walk(folder, onerror=_unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(place, name) for name in names if not name.startswith(".")]
    found = [file for file in found if file.suffix.lower() in SUFFIXES]
    return sorted(file for file in found if file.suffix.lower() != ".json" or _holds_rows(file))


def _unreadable(error: OSError) -> None:
    raise DataError(f"{error.filename}: cannot be listed ({error.strerror}). Correct its permissions.") from error


def _holds_rows(file: Path) -> bool:
    """Told from the first bytes, if it is a list. An object is parsed whole; a broken one counts: reading it tells."""
    with open(file, "rb") as opened:
        if opened.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            return True
    try:
        content = json.loads(file.read_bytes())
    except ValueError:
        return True
    return isinstance(content, dict) and isinstance(content.get("data"), list)


def _download(dataset: str, split: str | None, revision: str | None) -> list[Path]:
    from httpx import HTTPError
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    patterns = [f"*{split or ''}*{suffix}" for suffix in SUFFIXES]
    try:
        folder = Path(snapshot_download(dataset, repo_type="dataset", revision=revision, allow_patterns=patterns))
    except GatedRepoError as error:
        fix = "Accept its terms on its page of the hub, then log in: hf auth login"
        raise DataError(f"{dataset}: a dataset with terms that you have not accepted. {fix}") from error
    except RevisionNotFoundError as error:
        raise DataError(f"{dataset}: the dataset has no revision {revision!r}. Check its page of the hub.") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise DataError(
            f"{dataset}: no such file or folder here, and no such dataset on the hub that you may read. Check the "
            "path or the name; for a private dataset log in: hf auth login"
        ) from error
    except (OSError, HTTPError) as error:  # no connection, offline mode, a download that broke off
        raise DataError(
            f"{dataset}: no such file or folder here, and as a dataset it cannot be downloaded from the hub "
            f"({str(error).splitlines()[0]}). Check the path, or the connection; a download goes on where it was."
        ) from error
    files = _files_below(folder) if folder.exists() else []  # there is none if nothing fits the patterns
    if split is not None:
        word = re.compile(rf"(?<![A-Za-z]){re.escape(split)}(?![A-Za-z])")
        files = [file for file in files if word.search(file.relative_to(folder).with_suffix("").as_posix())]
    if not files:
        what = "" if split is None else f" with the word {split!r} in its path, as the files of a split have it"
        raise DataError(f"{dataset}: the dataset has no file that ends in {_KINDS}{what}. Check its page of the hub.")
    return files


# ---------------------------------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A row as it stands in a file.

    Attributes:
        source: where, "folder/file:line".
        unnamed: the id that it gets if it has none.
        value: the row; of a line that is no JSON, the error, whose `doc` is the line.
    """

    source: str
    unnamed: str
    value: Any


class RowFault(ValueError):
    """What is wrong with one row, and what to do; whoever reads the file adds where it stands.

    `kind` sorts faults for counting, see `records.BadRecordError`.
    """

    def __init__(self, reason: str, kind: str = "record") -> None:
        super().__init__(reason)
        self.kind = kind


def named_fields(value: Any) -> dict[str, Any]:
    """A row without the fields that are None: parquet files hold every column in every row. Raises RowFault."""
    if isinstance(value, json.JSONDecodeError):
        raise RowFault(f"not JSON ({value.msg}, column {value.colno}). Write the line again.", "not_json")
    if not isinstance(value, Mapping):
        raise RowFault(f"a row is an object with named fields, found {type(value).__name__}. Write it again.")
    return {key: field for key, field in value.items() if field is not None}


def listed(entries: Sequence[str]) -> str:
    """The first ten entries, a line each, and how many more there are; begins with a line break."""
    more = [f"and {len(entries) - _SHOWN:,} more"] if len(entries) > _SHOWN else []
    return "".join(f"\n  {entry}" for entry in [*entries[:_SHOWN], *more])


def read_rows(files: Sequence[Path], label: str = "reading") -> Iterator[Row]:
    """Every row of the files, in order; on a terminal with a bar, once they are many.

    JSON is told from JSON lines by what the file holds, because either is found under the other's name.

    Raises DataError for a file that cannot be parsed as a whole, EnvironmentMismatch for .parquet without pyarrow.
    """
    for file, name in zip(files, short_names(files), strict=True):
        if file.suffix.lower() == ".parquet":
            rows = _read_parquet(file)
        else:
            rows = _read_jsonl(file) if _has_lines(file) else _read_json(file)
        for number, value in _progress(rows, f"{label} {name}"):
            yield Row(f"{file}:{number}", f"{name}:{number}", value)


def _has_lines(path: Path) -> bool:
    """Whether it holds JSON lines: no list, and a first line that is an object by itself, or is named so."""
    with open(path, "rb") as file:
        first = next((line for line in file if line.strip()), b"").removeprefix(b"\xef\xbb\xbf").strip()
        more = any(line.strip() for line in file)
    if first.startswith(b"["):
        return False
    if path.suffix.lower() == ".jsonl":
        return True
    try:
        return more and isinstance(json.loads(first), dict)
    except ValueError:
        return False


def _read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    """(line number, row); a line that is no JSON comes as its error, so that the others can still be read."""
    # Bytes, because one wrong character must spoil its line and not the file.
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line.decode("utf-8-sig"))
            except json.JSONDecodeError as error:
                yield number, error
            except UnicodeDecodeError as error:
                yield number, json.JSONDecodeError("not UTF-8", line.decode(errors="replace"), error.start)


def _read_json(path: Path) -> list[tuple[int, Any]]:
    try:
        rows = json.loads(path.read_bytes().decode("utf-8-sig"))
    except ValueError as error:  # JSONDecodeError or UnicodeDecodeError
        raise DataError(f"{path}: not a JSON file ({error}). Download or write it again.") from error
    if isinstance(rows, Mapping) and isinstance(rows.get("data"), list):
        rows = rows["data"]
    if not isinstance(rows, list):
        raise DataError(f"{path}: holds {type(rows).__name__}, expected a list of records, or one on each line.")
    return list(enumerate(rows, start=1))


def _read_parquet(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise EnvironmentMismatch(f"{path}: reading parquet needs pyarrow. Fix: pip install pyarrow") from error
    try:
        file = pq.ParquetFile(path)
        # TwiFF-2.7M embeds the frames as JPEG beside their numbers: most of its bytes, and we read the clip instead.
        columns = [name for name in file.schema_arrow.names if name not in ("question_images", "reasoning_images")]
        number = 0
        for batch in file.iter_batches(batch_size=1024, columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file ({error}). Download or write it again.") from error


def _progress(rows: Iterable, label: str) -> Iterator:
    """`rows`, with a bar on a terminal once there are many of them."""
    bar = None
    total = len(rows) if isinstance(rows, Sequence) else None
    try:
        for done, row in enumerate(rows, start=1):
            if done == _LONG + 1:
                from tqdm import tqdm

                bar = tqdm(desc=label, total=total, initial=_LONG, unit="record", leave=False, disable=None)
            yield row
            if bar is not None:
                bar.update()
    finally:
        if bar is not None:
            bar.close()
