"""Which checkpoint folders are whole. No torch, no host.

A folder is whole if `MARKER` lies in it and every file named there has its size. The marker is written last, after all
processes have written their files and these are on the disk, so that a run killed while it saves leaves none.
"""

import json
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from future_l1_plugin.journal import atomic_write, to_disk

MARKER = "whole.json"


def seal(folder: str | os.PathLike) -> None:
    """Say that the folder is whole: every file to the disk, then the marker with their sizes. One process, the last.

    Raises DataError: the disk is full.
    """
    folder = Path(folder)
    to_disk(folder)
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != MARKER)
    with atomic_write(folder / MARKER) as marker:
        marker.write(json.dumps({str(file.relative_to(folder)): file.stat().st_size for file in files}).encode())


def fault(folder: str | os.PathLike) -> str | None:
    """Why the folder is not whole; None if it is."""
    folder = Path(folder)
    try:
        sizes = json.loads((folder / MARKER).read_bytes())
    except FileNotFoundError:
        return "its saving did not come to an end"
    except ValueError:
        return f"its {MARKER} is broken"
    for name, size in sizes.items():
        try:
            found = (folder / name).stat().st_size
        except FileNotFoundError:
            return f"{name} is missing"
        if found != size:
            return f"{name} has {found:,} bytes, expected {size:,}"
    return None


@dataclass
class Found:
    """The newest whole checkpoint, and the newer and older ones that are not whole, with the reason."""

    newest: Path | None = None
    step: int = 0
    broken: dict[Path, str] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """What a run says of those that it passes over."""
        return [f"passed over {folder}: {reason}" for folder, reason in sorted(self.broken.items())]


def newest_whole(folder: str | os.PathLike, name: str = "checkpoint-{}") -> Found:
    """Look at the checkpoints in `folder`; another process may be deleting broken ones.

    Args:
        name: of a checkpoint's folder, `{}` for its step.
    """
    found = Found()
    pattern = re.compile(re.escape(name).replace(r"\{\}", r"(\d+)"))
    folder = Path(folder)
    if not folder.is_dir():
        return found
    steps = {int(match[1]): path for path in folder.iterdir() if (match := pattern.fullmatch(path.name))}
    for step, path in sorted(steps.items(), reverse=True):
        reason = fault(path)
        if reason is not None:
            found.broken[path] = reason
        elif found.newest is None:
            found.newest, found.step = path, step
    return found


def delete(folder: Path) -> None:
    """The marker first: what a kill leaves of the folder is not whole."""
    (folder / MARKER).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
