"""Numbers from lmms-eval runs, side by side. No torch, no plotting."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from future_l1_plugin.errors import DataError
from future_l1_plugin.integrations.lmms_eval.results import Metric, read_results, read_samples
from future_l1_plugin.latent.tokens import LATENT, START

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
class Sample:
    """One answered question: right or not, its text, latent spans opened and latents in them."""

    doc_id: int
    question_type: str
    correct: bool
    text: str

    @property
    def spans(self) -> int:
        return self.text.count(START)

    @property
    def latents(self) -> int:
        return self.text.count(LATENT)


@dataclass(frozen=True)
class Run:
    """A model's futurebench run. Metrics are fractions."""

    name: str
    title: str
    metrics: dict[str, Metric]
    samples: list[Sample]


def read_run(name: str, title: str, output_path: Path) -> Run:
    """Read what `lmms-eval --output_path .. --log_samples` left. Raises DataError if the run did not finish."""
    samples = [
        Sample(
            doc_id=row["doc_id"],
            question_type=row["future_acc"]["question_type"],
            correct=bool(row["future_acc"]["score"]),
            text=_first(row["filtered_resps"]),
        )
        for row in read_samples(output_path)
    ]
    return Run(name, title, read_results(output_path), samples)


def _first(value: object) -> str:
    while isinstance(value, list):
        value = value[0]
    return str(value)


def paired_difference(run: Run, other: Run) -> Metric:
    """Mean of (run right) - (other right) over the same questions, and its standard error.

    Raises DataError if the two were not asked the same questions.
    """
    theirs = {sample.doc_id: sample.correct for sample in other.samples}
    if len(run.samples) != len(theirs) or any(sample.doc_id not in theirs for sample in run.samples):
        raise DataError(
            f"{run.name} and {other.name}: expected evaluations on the same questions, found {len(run.samples)} and "
            f"{len(theirs)} questions with different numbers. Delete the older of the two `eval` folders and evaluate "
            "that model again."
        )
    differences = [sample.correct - theirs[sample.doc_id] for sample in run.samples]
    n = len(differences)
    mean = sum(differences) / n
    variance = sum((d - mean) ** 2 for d in differences) / (n - 1) if n > 1 else None
    return Metric(mean, None if variance is None else math.sqrt(variance / n))


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
    """Header and rows: a run a row, percent with standard errors, spans and latents a response."""
    header = ["model", *COLUMNS.values(), "spans", "latents"]
    rows = []
    for run in runs.values():
        n = len(run.samples)
        numbers = [percent(run.metrics[key]) for key in COLUMNS]
        per_response = [f"{sum(getattr(s, key) for s in run.samples) / n:.2f}" for key in ("spans", "latents")]
        rows.append([run.title, *numbers, *per_response])
    return header, rows
