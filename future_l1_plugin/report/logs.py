"""Read metrics.jsonl files: verl's, `{"step": 7, "data": {..}}` a line, and SFT's, `{"step": 7, "loss": ..}` a line.

No torch, no plotting, no verl.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from future_l1_plugin.errors import DataError
from future_l1_plugin.evaluation.statistics import Metric

_VALIDATION = re.compile(r"val-core/(.+)/acc/mean@\d+")


@dataclass(frozen=True)
class RlLog:
    """What a run of verl logged: step -> name -> number, steps ascending. Step 0 is the validation before training."""

    steps: dict[int, dict[str, float]]

    def series(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of a metric, for the steps that have it."""
        return [(step, data[name]) for step, data in self.steps.items() if name in data]

    def validation(self, questions: int | None = None) -> list[tuple[int, Metric]]:
        """(step, accuracy) of each validation. The accuracy is the mean of the data sources, weighted equally.

        The standard error is the binomial one; None if the number of questions is not known. It comes from the metrics
        `val-aux/SOURCE/questions` where the run logged them.

        Args:
            questions: of a whole validation, for runs that did not log it; sources are then taken for equally large.
        """
        found = []
        for step, data in self.steps.items():
            means = {match[1]: value for name, value in data.items() if (match := _VALIDATION.fullmatch(name))}
            if means:
                share = questions / len(means) if questions else None
                sizes = {source: data.get(f"val-aux/{source}/questions", share) for source in means}
                found.append((step, _equal_mean(means, sizes)))
        return found


def read_rl_log(path: str | Path) -> RlLog:
    """Read what verl's `file` logger wrote.

    A resumed run repeats steps: of each metric of a step the last value counts (it validates before it goes on, so the
    last line of that step does not hold everything). Values that are no finite numbers are left out.

    Raises DataError: no such file, not a file of verl's, or no step in it.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file. verl writes it if trainer.logger holds `file`, as in [console, file].")
    steps: dict[int, dict[str, float]] = {}
    for number, row in _rows(path):
        if not isinstance(row.get("data"), dict):
            raise DataError(
                f'{path}:{number}: expected a line of verl\'s file logger, {{"step": .., "data": {{..}}}}, found the '
                f"keys {', '.join(row)}. An SFT run's curves are drawn by `future-l1 report FOLDER`."
            )
        steps.setdefault(row["step"], {}).update({k: float(v) for k, v in row["data"].items() if _is_number(v)})
    if not steps:
        raise DataError(f"{path}: expected a line a step, found none. The run ended before step 1; see its log.")
    return RlLog(dict(sorted(steps.items())))


def read_sft_log(path: str | Path) -> list[dict[str, Any]]:
    """The lines of an SFT run, in order. Raises DataError: a line that is neither JSON nor broken off."""
    return [row for _, row in _rows(Path(path)) if "data" not in row]


def _rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """(line number, row). What a kill broke off is left out, also where a resumed run wrote on in the same line."""
    rows = []
    lines = path.read_text(encoding="utf-8", errors="replace").rstrip("\n").split("\n")
    for number, line in enumerate(lines, 1):
        again = line.rfind('{"step":')
        row = _row(line) or _row(line[max(0, again) :])
        if row is not None:
            rows.append((number, row))
        elif line.strip() and again < 0 and number < len(lines):
            raise DataError(
                f'{path}:{number}: expected a JSON object with a `step`, found "{line[:60]}". Is it a metrics file?'
            )
    return rows


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _equal_mean(means: Mapping[str, float], sizes: Mapping[str, float | None]) -> Metric:
    value = math.fsum(means.values()) / len(means)
    if not all(sizes.values()):
        return Metric(value, None)
    variance = math.fsum(max(0.0, mean * (1 - mean)) / sizes[source] for source, mean in means.items())
    return Metric(value, math.sqrt(variance) / len(means))
