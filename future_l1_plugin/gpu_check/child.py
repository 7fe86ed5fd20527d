"""The process of one part: python -m future_l1_plugin.gpu_check.child MODULE TITLE full|small RESULT.json"""

import importlib
import sys
import time
import traceback
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from future_l1_plugin.gpu_check.results import FAILED, PASSED, SKIPPED, Recorder, Skip


@dataclass(frozen=True)
class Setting:
    """small: tiny shapes, for a CPU."""

    small: bool

    @cached_property
    def device(self) -> Any:
        """torch.device of the card, or of the CPU."""
        import torch

        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"


def run_part(module: str, results: Recorder, small: bool) -> None:
    """Run a part and write its verdict. A package that is not installed is a reason to skip; all else is a failure."""
    begin, result = time.monotonic(), results.result
    try:
        importlib.import_module(module).run(results, Setting(small))
    except Skip as reason:
        result.verdict, result.reason = SKIPPED, str(reason)
    except Exception as error:
        missing = error.name.split(".")[0] if isinstance(error, ModuleNotFoundError) and error.name else None
        if missing and missing not in ("future_l1_plugin", module.split(".")[0]):
            result.verdict, result.reason = SKIPPED, f"needs the package {missing}, which is not installed"
        else:
            traceback.print_exc()
            result.verdict, result.reason = FAILED, f"{type(error).__name__}: {error}".splitlines()[0][:300]
    else:
        broken = [figure.name for figure in result.figures if figure.ok is False]
        result.verdict, result.reason = (FAILED, "; ".join(broken)) if broken else (PASSED, "")
    result.seconds = round(time.monotonic() - begin, 1)
    results.save()


if __name__ == "__main__":
    name, title, size, out = sys.argv[1:]
    run_part(name, Recorder(title, Path(out)), size == "small")
