"""Table and picture of a probe."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from future_l1_plugin.evaluation.probe import Outcome, ProbeResult
from future_l1_plugin.evaluation.statistics import Metric
from future_l1_plugin.journal import atomic_write
from future_l1_plugin.report.tables import markdown, percent

CHANCE = 0.25  # of a guess among four options


def report_probe(result: ProbeResult, out: str | Path) -> None:
    """Write probe.json, probe.md and probe.png into the folder `out`, and print the tables."""
    out = Path(out)
    text = probe_tables(result)
    with atomic_write(out / "probe.json") as file:
        file.write((json.dumps(_numbers(result), indent=1, ensure_ascii=False) + "\n").encode())
    with atomic_write(out / "probe.md") as file:
        file.write(text.encode())
    plot_probe(result.outcomes, out / "probe.png")
    print(f"{text}\n{out}: probe.md, probe.json, probe.png; the responses: answers.jsonl")


def _numbers(result: ProbeResult) -> dict[str, Any]:
    def numbers(outcome: Outcome) -> dict[str, Any]:
        answers = {s.id: [s.prediction, s.correct] for s in outcome.samples}
        against = outcome.against and {**asdict(outcome.against), "interval": outcome.against.interval}
        return {
            "accuracy": asdict(outcome.accuracy),
            "against": against,
            "touched": outcome.touched,
            "answers": answers,
        }

    return {
        "model": result.model,
        "conditions": {outcome.condition: numbers(outcome) for outcome in result.outcomes},
        "latents": result.latents,
        "retrieval": result.retrieval and asdict(result.retrieval),
    }


def probe_tables(result: ProbeResult) -> str:
    """Markdown: accuracy by condition, what the latents hold."""
    n = len(result.outcomes[0].samples)
    header = [
        "latents",
        "accuracy",
        "minus left alone",
        "95% interval",
        "gained",
        "lost",
        "touched",
        "latents per response",
    ]
    parts = [
        markdown(header, [_row(outcome) for outcome in result.outcomes]),
        f"futurebench, {n} questions, percent ± standard error, clustered by video. gained, lost: answers that became "
        "right, wrong. touched: responses in which a latent was replaced.\n",
        markdown(
            ["questions", "responses", "spans", "latents", "text tokens", "cosine of adjacent spans"],
            [_hop(row) for row in result.latents],
        ),
    ]
    if (found := result.retrieval) is not None:
        parts.append(
            f"A span's own future frame is the nearest of {found.pool_size} in {percent(found.pool)}% (chance "
            f"{100 * found.pool_chance:.1f}), of its clip's frames in {percent(found.same_clip)}% (chance "
            f"{100 * found.same_clip_chance:.1f}); {found.spans} spans of {found.records} records.\n"
        )
    return "\n".join(parts)


def _row(outcome: Outcome) -> list[str]:
    row = [outcome.condition, percent(outcome.accuracy)]
    if (pair := outcome.against) is None:
        row += ["-"] * 4
    else:
        low, high = pair.interval or (None, None)
        interval = "-" if low is None else f"{100 * low:.1f} to {100 * high:.1f}"
        row += [percent(Metric(pair.difference, pair.stderr)), interval, str(pair.gained), str(pair.lost)]
    latents = sum(sample.latents for sample in outcome.samples) / len(outcome.samples)
    return [*row, "-" if outcome.touched is None else str(outcome.touched), f"{latents:.2f}"]


def _hop(row: dict[str, Any]) -> list[str]:
    cosine = row["adjacent_cosine"]
    numbers = [f"{row[key]:.2f}" for key in ("spans", "latents", "text_tokens")]
    return [row["question_type"], str(row["responses"]), *numbers, "-" if cosine is None else f"{cosine:.3f}"]


def plot_probe(outcomes: Sequence[Outcome], path: Path) -> None:
    """Accuracy by condition with standard errors; broken lines: left alone, and chance."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 3.6))
    values = [100 * outcome.accuracy.value for outcome in outcomes]
    errors = [100 * (outcome.accuracy.stderr or 0) for outcome in outcomes]
    colours = ["C0" if o.against is None else "C2" if o.condition.startswith("budget") else "C1" for o in outcomes]
    axes.bar(range(len(values)), values, 0.7, yerr=errors, capsize=3, color=colours)
    axes.axhline(values[0], color="C0", linestyle="--", linewidth=1)
    axes.axhline(100 * CHANCE, color="grey", linestyle=":", label="chance")
    axes.set_xticks(range(len(values)), [outcome.condition for outcome in outcomes], rotation=20, ha="right")
    axes.set_ylabel("accuracy, %")
    axes.set_ylim(0, 100)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
