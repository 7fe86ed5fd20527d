"""Results on disk as they come, so that a killed run goes on where it was. No torch, no host.

A run that takes hours keeps each finished result as a row of a `Journal`, under a key that says everything the result
depends on (`key_of`, `file_mark`, `checkpoint_mark`). Run again, it reads the journal, leaves out what is there, and at
the end writes its final files with `atomic_write`, so that each of them is whole or absent.
"""

import errno
import glob
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from future_l1_plugin.errors import DataError

logger = logging.getLogger(__name__)

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # disk full, quota used up, file size limit


# ---- keys -----------------------------------------------------------------------------------------------------------


def key_of(*parts: Any) -> str:
    """Hash of everything that a result depends on; parts are JSON values."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def file_mark(path: str | os.PathLike) -> list[Any]:
    """A file as part of a key: its absolute path, size and time of change. A path that is no file: the path alone."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return [os.path.abspath(path)]
    return [os.path.abspath(path), status.st_size, status.st_mtime_ns]


def checkpoint_mark(path: str | os.PathLike) -> list[Any]:
    """A checkpoint as part of a key: a folder's weights, tokenizer and settings by `file_mark`; else the hub id.

    Training again into the same folder makes another checkpoint.
    """
    folder = Path(path)
    if not folder.is_dir():
        return [str(path)]
    files = [file for file in folder.iterdir() if file.suffix in (".safetensors", ".bin", ".json", ".jinja", ".txt")]
    return [file_mark(file) for file in sorted(files)]


def fingerprint(path: str | os.PathLike) -> list[Any]:
    """A checkpoint by content, so that copies on several machines are one: sizes, configuration, ends of the weights.

    Not every byte: that would take minutes for a large model. A hub id stands for itself.
    """
    folder = Path(path)
    if not folder.is_dir():
        return [str(path)]
    marks = []
    for file in sorted(folder.iterdir()):
        if file.suffix in (".safetensors", ".bin", ".json", ".jinja", ".txt"):
            size = file.stat().st_size
            with open(file, "rb") as stream:
                digest = hashlib.sha256(stream.read(1 << 20))
                stream.seek(max(0, size - (1 << 20)))
                digest.update(stream.read())
            marks.append([file.name, size, digest.hexdigest()[:16]])
    return marks


# ---- rows as they come ----------------------------------------------------------------------------------------------


def json_line(row: Any, default: Callable[[Any], Any] | None = None) -> bytes:
    """A row of a JSONL file, with its newline. `default` turns what JSON does not know into something it does."""
    try:
        return (json.dumps(row, ensure_ascii=False, default=default) + "\n").encode()
    except UnicodeEncodeError:  # half a character (a lone surrogate), which only an escape can hold
        return (json.dumps(row, default=default) + "\n").encode()


class Journal:
    """Append-only JSONL of results, each row with its "key".

    Several processes (ranks of one run, shards on several machines) write a file each, `x.jsonl`, `x.rank1.jsonl`, ..,
    and read all of them, so that a run may go on with another number of them. A file has one writer at a time.

    Args:
        path: the file of part 0. Folders are made at the first `append`.
        part: which of the files this process writes.
    """

    def __init__(self, path: str | os.PathLike, part: int = 0) -> None:
        self.path = Path(path)
        self._own = self.path if part == 0 else self.path.with_suffix(f".rank{part}{self.path.suffix}")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Rows of all parts, one at a time. A line that is no row (cut off by a kill) is skipped and counted in the
        log."""
        others = self.path.parent.glob(f"{glob.escape(self.path.stem)}.rank*{glob.escape(self.path.suffix)}")
        for file in [self.path, *sorted(others)]:
            if not file.exists():
                continue
            broken = 0
            with open(file, "rb") as lines:
                for line in lines:
                    row = _row(line)
                    if row is not None:
                        yield row
                    elif line.strip():
                        broken += 1
            if broken:
                logger.warning("%s: %d broken line(s), as a killed run leaves; they are made again", file, broken)

    def read(self) -> dict[str, dict[str, Any]]:
        """Rows by key, of all parts; of two rows with one key the later."""
        return {row["key"]: row for row in self}

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Write rows and see them to the disk.

        Raises:
            DataError: the disk is full, or the file cannot be written. None of `rows` is kept then; everything before
                is, and the file ends with a whole row.
        """
        data = b"".join(json_line(row) for row in rows)
        if not data:
            return
        try:
            self._own.parent.mkdir(parents=True, exist_ok=True)
            # Without a buffer: one would try again to write its rest when it is closed, after the file was cut back.
            with open(self._own, "ab+", buffering=0) as file:
                self._write(file.fileno(), data)
        except OSError as error:
            raise _not_written(self._own, error) from error

    def _write(self, file: int, data: bytes) -> None:
        end = os.lseek(file, 0, os.SEEK_END)
        # A line cut off by a kill must not swallow the next one.
        if end > 0 and os.pread(file, 1, end - 1) != b"\n":
            data = b"\n" + data
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(file, rest) :]
            os.fsync(file)
        except BaseException:
            os.ftruncate(file, end)
            raise


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:  # JSONDecodeError or UnicodeDecodeError
        return None
    return row if isinstance(row, dict) and isinstance(row.get("key"), str) else None


# ---- final files ----------------------------------------------------------------------------------------------------


@contextmanager
def atomic_write(path: str | os.PathLike, alone: bool = True) -> Iterator[BinaryIO]:
    """A file to write bytes to, which appears under its name when the `with` block ends, whole and on the disk.

    If the block fails, whatever stood under the name stays.

    Args:
        path: its folder must exist.
        alone: no other process writes this file now, so what killed runs left of it is deleted. False: others may, and
            the last one's stays.

    Raises:
        DataError: the disk is full, or the file cannot be written.
    """
    path = Path(path)
    # In the same folder, because a rename is atomic only within one file system.
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        for left_over in path.parent.glob(f".{glob.escape(path.name)}.*.part") if alone else ():
            left_over.unlink()
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise _not_written(path, error) from error
    finally:
        part.unlink(missing_ok=True)


def to_disk(folder: str | os.PathLike) -> None:
    """Every file below `folder`, and the names of all: what is renamed or marked as whole after that is, in a power cut
    too."""
    folder = Path(folder)
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    places = {file.parent for file in files} | {folder}
    for path in [*files, *sorted(places, reverse=True)]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _not_written(path: Path, error: OSError) -> DataError:
    fix = "free space" if error.errno in _NO_SPACE else "fix that"
    return DataError(
        f"{path}: cannot be written ({error}). Everything finished before is kept: {fix} and run the same "
        "command again."
    )
