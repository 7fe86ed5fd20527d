"""EasyR1's checkpoints on the disk: which one a run goes on from, and when old ones may go.

EasyR1 removes old checkpoints before the new one is there, goes on from the one that its tracker file names, and starts
anew without a word of error if that one is gone. A run killed in a save could lose everything that way.
"""

import json
import os
from pathlib import Path

from verl.utils.checkpoint import CHECKPOINT_TRACKER

from future_l1_plugin.journal import atomic_write
from future_l1_plugin.resume import MARKER, Found, fault, newest_whole, seal

NAME = "global_step_{}"


def finish(folder: Path, checkpoint: Path) -> None:
    """A checkpoint is written and EasyR1's tracker in `folder` names it: leave a copy of that in it, and mark it whole.

    Raises DataError: the disk is full.
    """
    with atomic_write(checkpoint / CHECKPOINT_TRACKER) as copy:
        copy.write((folder / CHECKPOINT_TRACKER).read_bytes())
    seal(checkpoint)


def settle(folder: Path) -> list[str]:
    """Have EasyR1's tracker name a whole checkpoint: the one that it names already, else the newest.

    Returns lines to print about what was passed over.
    """
    tracker, found = folder / CHECKPOINT_TRACKER, newest_whole(folder, NAME)
    named, reason = _named(folder)
    if named is not None:
        newer = [line for path, line in _broken(found) if _step(path) > _step(named)]
        return [*newer, f"going on from {named}"] if newer else []
    lines = [line for _, line in _broken(found)]
    if reason is not None:
        lines.insert(0, f"passed over what {tracker} says: {reason}")
    if found.newest is not None:
        with atomic_write(tracker) as file:
            file.write((found.newest / CHECKPOINT_TRACKER).read_bytes())
        return [*lines, f"going on from {found.newest}"]
    tracker.unlink(missing_ok=True)
    return [*lines, f"no checkpoint in {folder} is whole: training starts from its beginning"] if lines else []


def _named(folder: Path) -> tuple[Path | None, str | None]:
    """The checkpoint that the tracker names, if it is whole; else why not, None for a folder without a tracker.

    EasyR1 writes the tracker last: what it names was whole, with our mark (a kill may come between) or without.
    """
    try:
        step = json.loads((folder / CHECKPOINT_TRACKER).read_bytes())["last_global_step"]
    except FileNotFoundError:
        return None, None
    except (ValueError, KeyError, TypeError):
        return None, "it is cut off"
    checkpoint = folder / NAME.format(step)
    if not checkpoint.is_dir():
        return None, f"there is no {checkpoint.name}"
    if (checkpoint / MARKER).exists() and (reason := fault(checkpoint)):
        return None, f"{checkpoint.name}: {reason}"
    return checkpoint, None


def _broken(found: Found) -> list[tuple[Path, str]]:
    return list(zip(sorted(found.broken), found.lines(), strict=True))


def _step(path: os.PathLike) -> int:
    return int(Path(path).name.rpartition("_")[2])
