"""A task's checked items, stored where `datasets` reads them. No torch, no lmms-eval."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from future_l1_plugin.journal import atomic_write


def items_folder() -> Path:
    """Our folder in the datasets cache."""
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE) / "future_l1_plugin"


def store_items(task: str, docs: Iterable[dict[str, Any]]) -> Path:
    """The JSONL file of these items; its name contains its content's hash."""
    text = "".join(json.dumps(doc, ensure_ascii=False) + "\n" for doc in docs)
    target = items_folder() / f"{task}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.jsonl"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(target, alone=False) as file:  # several ranks may be here at once
            file.write(text.encode())
    return target
