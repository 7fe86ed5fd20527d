"""What a path must be before a checkpoint is read from it or written there, and errors that name checkpoint and fix."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from future_l1_plugin.errors import CheckpointError
from future_l1_plugin.model.backbone import by_type


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turn what transformers raises for missing and broken files into an error that names checkpoint and fix."""
    try:
        yield
    except (OSError, json.JSONDecodeError) as error:
        said = str(error).splitlines()[0]
        if Path(path).exists():
            raise CheckpointError(f"{path}: the checkpoint is incomplete: {said} Copy or convert it again.") from error
        raise CheckpointError(
            f"{path}: no such folder here, and the hub did not give it: {said} Check path or name, and the connection."
        ) from error


def check_folder(path: str | Path) -> None:
    """A local path must be a checkpoint of a family that is known; anything else is taken for a hub id.

    Raises CheckpointError: it is not.
    """
    folder = Path(path)
    config = folder / "config.json"
    if folder.exists() and not config.exists():
        raise CheckpointError(f"{path}: expected a checkpoint folder, found no config.json in it")
    if config.exists():
        with reading(path):
            found = json.loads(config.read_text()).get("model_type")
        by_type(found, config)


def is_absent(path: str | Path) -> bool:
    """Whether `path` looks like a local path (not a hub id such as 'Qwen/Qwen3-VL-8B-Instruct') that is not there."""
    text = str(path)
    local = text.startswith((".", "/", "~")) or text.count("/") != 1
    return local and not Path(path).exists()


def check_new(out_path: str | Path) -> None:
    """Raise CheckpointError if a checkpoint cannot be written there without touching what is there already."""
    out = Path(out_path)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: expected a new or empty folder, found files in it. Name another or delete it.")
