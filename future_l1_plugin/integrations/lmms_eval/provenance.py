"""What a result depends on, for `metadata` in a task's YAML, which lmms-eval copies into results.json.

lmms-eval makes the model before it loads the tasks, and offers a model no place of its own in results.json. So the
model leaves word here, and a task's `metadata`, computed while the task is loaded, fetches it:

    metadata: !function utils.metadata        # {"version": .., "future_l1": provenance(data)}

No torch, no lmms-eval.
"""

import os
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from future_l1_plugin.journal import key_of

PACKAGES = ("future_l1_plugin", "lmms-eval", "transformers", "torch", "torchvision", "av")

_describe: Callable[[], dict[str, Any]] | None = None


def announce(describe: Callable[[], dict[str, Any]]) -> None:
    """The model that was made last; `describe` is asked only if a task wants to know."""
    global _describe
    _describe = describe


def provenance(data: dict[str, Any]) -> dict[str, Any]:
    """{"data": as given, "model": what the model says, None for models of others, "versions": by package}."""
    return {
        "data": data,
        "model": None if _describe is None else _describe(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def data_hash(items: Any, media: Mapping[str, str | os.PathLike]) -> str:
    """Of items (JSON values) and of their media, name in the items -> file: by size, content would take minutes."""
    return key_of(items, sorted([name, os.stat(file).st_size] for name, file in media.items()))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
