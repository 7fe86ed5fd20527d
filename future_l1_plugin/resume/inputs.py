"""What a run depends on, by content and not by path: record files, the start checkpoint, media, which records are used.

Taken at the start of a run and kept in its folder as `FILE`; a run that goes on compares. So a moved folder is free and
a file that was edited in place is not. No torch, no host.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from future_l1_plugin.errors import DataError
from future_l1_plugin.journal import atomic_write

FILE = "inputs.json"
_WHOLE = 64 * 2**20  # bytes; a larger file of a checkpoint is read at places only
_BLOCKS, _BLOCK = 64, 64 * 2**10  # places, bytes at each
_CHECKPOINT = (".safetensors", ".bin", ".json", ".jinja", ".txt", ".model")
_SHOWN = 3
_REPAIRED = 16  # media that may differ, and no more than every twentieth
#: What a difference is called, and what it does.
_NAMES = {
    "records": "record files",
    "used": "the records that are used, and their order",
    "checkpoint": "files of the start checkpoint",
    "media": "videos and images",
}


@dataclass
class Inputs:
    """Digests. All are JSON values.

    Attributes:
        records: file name -> digest of its bytes.
        used: "ids" of the records or prompts that are trained on, in order.
        checkpoint: file name -> digest; of a large file its size and a sample of its bytes. {"hub": id} for a hub id.
        media: file name -> sizes in bytes, of all files of that name; 0 for one that is not there.
        settings: what the run resolved for itself, as keys of `table`.
    """

    records: dict[str, str] = field(default_factory=dict)
    used: dict[str, list[str]] = field(default_factory=dict)
    checkpoint: dict[str, str] = field(default_factory=dict)
    media: dict[str, list[int]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        records: Iterable[str | os.PathLike],
        ids: Iterable[str],
        checkpoint: str | os.PathLike,
        media: Iterable[str | os.PathLike],
        settings: dict[str, Any] | None = None,
    ) -> "Inputs":
        """Read what is needed: record files whole, a few MiB of each file of weights, of media only their sizes.

        Raises DataError: a file cannot be read.
        """
        try:
            return cls(_files(records), {"ids": list(ids)}, _checkpoint(checkpoint), _sizes(media), settings or {})
        except OSError as error:
            raise DataError(f"{error.filename}: cannot be read ({error.strerror}). Put it back.") from error

    def write(self, folder: str | os.PathLike) -> None:
        with atomic_write(Path(folder) / FILE) as file:
            file.write(json.dumps(asdict(self), indent=1).encode())

    @classmethod
    def read(cls, folder: str | os.PathLike) -> "Inputs | None":
        """What the run's start left in its folder; None if it left nothing."""
        try:
            return cls(**json.loads((Path(folder) / FILE).read_bytes()))
        except FileNotFoundError:
            return None

    def check(self, before: "Inputs", folder: str | os.PathLike, way_out: str) -> list[str]:
        """Lines to print: a few videos or images of another size are taken for repaired ones.

        Raises DataError: anything else differs from `before`; names it, and what to do.
        """
        repaired = self._repaired(before)
        names = [key for key in _NAMES if key != "media" or not repaired]
        found = [f"{_NAMES[key]} ({what})" for key in names if (what := self._change(before, key))]
        if found:
            raise DataError(
                f"{folder}: what the run was started with has changed since: {'; '.join(found)}. Going on, it would "
                f"see some records twice and others never, or mix two models. Put back what was there. {way_out}"
            )
        return [f"going on although {name} is not the file of the run's start (repaired, or gone)" for name in repaired]

    def _repaired(self, before: "Inputs") -> list[str]:
        """Media whose size alone differs, if they are few; else nothing."""
        old, new = before.media, self.media
        if old.keys() != new.keys():
            return []
        changed = sorted(name for name in old if old[name] != new[name])
        return changed if len(changed) <= min(_REPAIRED, max(1, len(old) // 20)) else []

    def _change(self, before: "Inputs", key: str) -> str:
        old, new = getattr(before, key), getattr(self, key)
        if old == new:
            return ""
        if key == "used":
            then, now = len(old["ids"]), len(new["ids"])
            same = " (as many, but others)" if then == now else ""
            return f"{then:,} -> {now:,}{same}: a limit, on_bad or a file that reads otherwise now"
        lines = [f"{name} was changed" for name in sorted(old.keys() & new.keys()) if old[name] != new[name]]
        lines += [f"{name} is gone" for name in sorted(old.keys() - new.keys())]
        lines += [f"{name} is new" for name in sorted(new.keys() - old.keys())]
        more = f", and {len(lines) - _SHOWN:,} more" if len(lines) > _SHOWN else ""
        return ", ".join(lines[:_SHOWN]) + more


def _files(paths: Iterable[str | os.PathLike]) -> dict[str, str]:
    found: dict[str, str] = {}
    for path in map(Path, paths):
        name, number = path.name, 2
        while name in found:  # of another folder
            name, number = f"{path.name} ({number})", number + 1
        found[name] = _whole(path)
    return found


def _checkpoint(path: str | os.PathLike) -> dict[str, str]:
    folder = Path(path)
    if not folder.is_dir():
        return {"hub": str(path)}
    files = sorted(file for file in folder.iterdir() if file.suffix in _CHECKPOINT and file.is_file())
    return {file.name: _whole(file) if file.stat().st_size <= _WHOLE else _sample(file) for file in files}


def _sizes(paths: Iterable[str | os.PathLike]) -> dict[str, list[int]]:
    """By name alone: two files of one name in two folders are told apart by their sizes."""
    files = sorted({os.fspath(path) for path in paths})
    found: dict[str, list[int]] = {}
    with ThreadPoolExecutor(16) as pool:  # a network's answers overlap
        for file, size in zip(files, pool.map(_size, files), strict=True):
            found.setdefault(os.path.basename(file), []).append(size)
    return {name: sorted(sizes) for name, sizes in found.items()}


def _size(file: str) -> int:
    try:
        return os.path.getsize(file)
    except FileNotFoundError:
        return 0


def _whole(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _sample(file: Path) -> str:
    """Size, and a digest of blocks spread evenly from the first byte to the last."""
    size = file.stat().st_size
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        for i in range(_BLOCKS):
            opened.seek((size - _BLOCK) * i // (_BLOCKS - 1))
            digest.update(opened.read(_BLOCK))
    return f"{size} {digest.hexdigest()}"
