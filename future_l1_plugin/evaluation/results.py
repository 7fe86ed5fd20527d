"""Read what a run of lmms-eval left behind. No torch, no lmms-eval."""

import json
from pathlib import Path
from typing import Any

from future_l1_plugin.errors import DataError
from future_l1_plugin.evaluation.statistics import Metric


def results_file(output_path: str | Path) -> Path:
    """The newest `*_results.json` under `output_path`.

    lmms-eval ends with exit code 0 after a failure, so a missing file is how a failed run shows.

    Raises DataError: none there.
    """
    files = sorted(Path(output_path).rglob("*_results.json"), key=lambda file: (file.stat().st_mtime_ns, file.name))
    if not files:
        raise DataError(
            f"{output_path}: no *_results.json in it, so the run did not finish (lmms-eval exits with 0 all the same). "
            "Its output names the error; run it again with --verbosity DEBUG for the traceback."
        )
    return files[-1]


def read_results(output_path: str | Path, task: str = "futurebench") -> dict[str, Metric]:
    """Metrics of a task from the newest results below `output_path`, a folder given as --output_path.

    The standard error is the clustered one where it is defined (questions about one video are not independent),
    else the plain one, else lmms-eval's default column.

    Raises DataError: no results, or none of this task.
    """
    file = results_file(output_path)
    tasks = json.loads(file.read_text(encoding="utf-8"))["results"]
    if task not in tasks:
        raise DataError(f"{file}: has no results of task {task!r}, found {', '.join(tasks) or 'none'}")
    numbers = {}
    for key, value in tasks[task].items():
        metric, comma, selection = key.partition(",")
        # ".._stderr" alone is no metric; "macro_acc_stderr" is listed by lmms-eval among the metrics.
        if not comma or metric.endswith(("_stderr", "_stderr_clt", "_stderr_clustered")):
            continue
        errors = [
            tasks[task].get(f"{metric}_{kind},{selection}") for kind in ("stderr_clustered", "stderr_clt", "stderr")
        ]
        numbers[metric] = Metric(_number(value), next((e for e in map(_number, errors) if e is not None), None))
    return numbers


def read_samples(output_path: str | Path, task: str = "futurebench") -> list[dict[str, Any]]:
    """Logged samples of the same run as `read_results` (needs --log_samples), in order of doc_id.

    Raises DataError: no results, or no samples beside them.
    """
    results = results_file(output_path)
    file = results.with_name(results.name.replace("_results.json", f"_samples_{task}.jsonl"))
    if not file.exists():
        raise DataError(f"{file}: no such file. Run lmms-eval with --log_samples.")
    samples = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    return sorted(samples, key=lambda sample: sample["doc_id"])


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
