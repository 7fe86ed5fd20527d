"""Numbers from lmms-eval runs, side by side. No torch, no plotting."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from future_l1_plugin.errors import DataError
from future_l1_plugin.evaluation.compare import Sample, paired
from future_l1_plugin.evaluation.results import read_results, read_samples
from future_l1_plugin.evaluation.statistics import Metric

#: futurebench metric -> column title, in the order of the table.
COLUMNS = {
    "future_acc": "all",
    "hop1_acc": "1-hop",
    "hop2_acc": "2-hop",
    "hop3_acc": "3-hop",
    "interpolation_acc": "interpolation",
    "macro_acc": "macro",
    "parse_failure_rate": "no answer",
}


@dataclass(frozen=True)
class Run:
    """A model's futurebench run. Metrics are fractions."""

    name: str
    title: str
    metrics: dict[str, Metric]
    samples: list[Sample]


def read_run(name: str, title: str, output_path: Path) -> Run:
    """Read what `lmms-eval --output_path .. --log_samples` left. Raises DataError if the run did not finish."""
    samples = [Sample.from_row(row) for row in read_samples(output_path)]
    return Run(name, title, read_results(output_path), samples)


def paired_difference(run: Run, other: Run) -> Metric:
    """Mean of (run right) - (other right) over the same questions, and its standard error.

    Raises DataError if the two were not asked the same questions.
    """
    theirs = {sample.doc_id for sample in other.samples}
    if len(run.samples) != len(theirs) or any(sample.doc_id not in theirs for sample in run.samples):
        raise DataError(
            f"{run.name} and {other.name}: expected evaluations on the same questions, found {len(run.samples)} and "
            f"{len(theirs)} questions with different numbers. Delete the older of the two `eval` folders and evaluate "
            "that model again."
        )
    found = paired(run.samples, other.samples)
    return Metric(found.difference, found.stderr)


def percent(metric: Metric) -> str:
    """'71.2 +- 2.1' from fractions."""
    if metric.value is None:
        return "-"
    error = "" if metric.stderr is None else f" ± {100 * metric.stderr:.1f}"
    return f"{100 * metric.value:.1f}{error}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def results_table(runs: Mapping[str, Run]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a run a row, percent with standard errors; spans, latents and tokens (latents among them) a
    response; seconds per sample and correct answers per second, from logs that have times, else "-"."""
    header = ["model", *COLUMNS.values(), "spans", "latents", "tokens", "s/sample", "correct/s"]
    return header, [[run.title, *(percent(run.metrics[key]) for key in COLUMNS), *_cost(run)] for run in runs.values()]


def _cost(run: Run) -> list[str]:
    def mean(name: str) -> float | None:
        values = [getattr(sample, name) for sample in run.samples]
        return None if None in values else sum(values) / len(values)

    seconds = mean("seconds")
    right = mean("correct") / seconds if seconds else None
    columns = [(mean("spans"), ".2f"), (mean("latents"), ".2f"), (mean("tokens"), ".1f"), (seconds, ".3g")]
    return ["-" if value is None else f"{value:{form}}" for value, form in [*columns, (right, ".3g")]]
