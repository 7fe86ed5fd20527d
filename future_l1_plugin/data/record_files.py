"""Files of TwiFF records, read whole: the good records in order, and the bad ones counted and named."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from future_l1_plugin.data.records import BadRecordError, TwiffRecord
from future_l1_plugin.data.sources import Row, data_files, is_dataset, listed, read_rows
from future_l1_plugin.errors import ConfigError, DataError


@dataclass(frozen=True)
class BadRecord:
    """A row that was left out: where it stands, its id ("-" if it has none) and why."""

    source: str
    id: str
    reason: str


@dataclass(frozen=True)
class Records(Sequence):
    """The good records of the files that were read, in their order, and what was left out."""

    items: list[TwiffRecord]
    bad: list[BadRecord] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


class RecordReader:
    """Turns rows into records, and remembers ids over all of them."""

    def __init__(self, video_root: str | os.PathLike) -> None:
        self._root = video_root
        self._taken: dict[str, str] = {}  # id -> where it stands

    def read(self, row: Row) -> TwiffRecord:
        """One row. Raises BadRecordError; the second of two rows with one id is bad."""
        record = TwiffRecord.from_dict(row.value, self._root, row.source, row.unnamed)
        if record.id in self._taken:
            reason = f"the id is taken by {self._taken[record.id]}. Ids must differ."
            raise BadRecordError(row.source, record.id, reason, "duplicate_id")
        self._taken[record.id] = row.source
        return record


def load_records(
    data: str | os.PathLike,
    video_root: str | os.PathLike | None = None,
    on_bad: Literal["raise", "skip"] = "raise",
) -> Records:
    """Read records from a file, a folder or a dataset of the hub.

    Args:
        data: .json (a list, or {"data": list}), .jsonl or .parquet; a folder of such files; or `org/name`, with
            `:split` and `@revision` behind it if need be (`sources.data_files`).
        video_root: folder of the clips; None means the folder `data`, or the folder that the file lies in. A dataset of
            the hub needs one: clips are never downloaded.
        on_bad: "raise" reads to the end and then raises one error that counts all bad records and lists the first ten;
            "skip" leaves them out and lists them in `.bad`.

    A row without an id is named "file.jsonl:line" (row number, from 1, in .json and .parquet). The second of two rows
    with one id is bad, in whichever file it stands.

    Raises:
        DataError: no such file, folder or dataset, a file that cannot be parsed as a whole, no good record, or bad
            records.
        ConfigError: another value of `on_bad`, or no `video_root` for a dataset of the hub.
        EnvironmentMismatch: a .parquet file, and pyarrow is not installed.
    """
    if on_bad not in ("raise", "skip"):
        raise ConfigError(f"on_bad: {on_bad!r}, expected raise or skip")
    if video_root is None and is_dataset(data):
        raise ConfigError(f"{data}: a dataset of the hub comes without clips. Name their folder as the video root.")
    files = data_files(data)
    path = Path(data)
    root = video_root if video_root is not None else path if path.is_dir() else path.parent

    good: list[TwiffRecord] = []
    bad: list[BadRecord] = []
    reader = RecordReader(root)
    for row in read_rows(files):
        try:
            good.append(reader.read(row))
        except BadRecordError as error:
            bad.append(BadRecord(error.source, error.id, error.reason))

    if bad and (on_bad == "raise" or not good):
        way_on = "" if not good else f" Fix them, or go on with the other {len(good):,} by `on_bad: skip`."
        shown = listed([f"{item.source} (id {item.id}): {item.reason}" for item in bad])
        raise DataError(f"{data}: {len(bad):,} of {len(good) + len(bad):,} records are bad.{way_on}{shown}")
    if not good:
        raise DataError(f"{data}: holds no record. Check that it is what was meant.")
    return Records(good, bad)
