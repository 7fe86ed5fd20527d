"""Pictures of runs, by matplotlib."""

import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from future_l1_plugin.data.frames import read_frames
from future_l1_plugin.errors import DataError
from future_l1_plugin.latent.tokens import END, LATENT, START
from future_l1_plugin.report.logs import RlLog, read_rl_log, read_sft_log
from future_l1_plugin.report.tables import COLUMNS, Run

_KINDS = ["future_acc", "hop1_acc", "hop2_acc", "hop3_acc", "interpolation_acc"]
#: Steps that the bold lines of RL runs average: this one and those before it.
WINDOW = 5
_MARKERS = "os^Dvp"  # by run, for prints in grey
_LATENT_TERMS = {"r_ctr": "-", "r_div": "--"}  # reward term -> line style
_SPAN = re.compile(f"{re.escape(START)}((?:{re.escape(LATENT)})*)(?:{re.escape(END)})?")


def plot_accuracy(runs: Mapping[str, Run], path: Path) -> None:
    """Bars with standard errors: accuracy by kind of question, one colour a model."""
    figure, axes = plt.subplots(figsize=(9, 4))
    width = 0.8 / len(runs)
    for i, run in enumerate(runs.values()):
        metrics = [run.metrics[key] for key in _KINDS]
        axes.bar(
            [x + (i - (len(runs) - 1) / 2) * width for x in range(len(_KINDS))],
            [100 * (m.value or 0) for m in metrics],
            width,
            yerr=[100 * (m.stderr or 0) for m in metrics],
            capsize=3,
            label=run.title,
        )
    axes.axhline(25, color="grey", linestyle=":", label="chance")
    axes.set_xticks(range(len(_KINDS)), [COLUMNS[key] for key in _KINDS])
    axes.set_ylabel("accuracy, %")
    axes.set_ylim(0, 100)
    if len(runs) > 3:  # too many names for one line within the axes
        axes.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    else:
        axes.legend(ncols=len(runs) + 1, loc="upper center")
    _save(figure, path)


def plot_curves(logs: Mapping[str, Path], path: Path) -> None:
    """Cross-entropy and latent loss by step, from metrics.jsonl files of SFT runs."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2))
    for title, log in logs.items():
        rows = read_sft_log(log)
        for axis, key in zip(axes, ("ce_loss", "latent_loss"), strict=True):
            points = [(row["step"], row[key]) for row in rows if row.get(key)]
            if points:
                axis.plot(*zip(*points, strict=True), label=title)
    for axis, title in zip(axes, ("cross-entropy", "latent loss (before lambda)"), strict=True):
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.set_yscale("log")
        axis.legend()
    _save(figure, path)


def plot_rl_curves(
    logs: Mapping[str, RlLog], path: Path, questions: int | None = None, chance: float | None = None
) -> None:
    """Save `rl_figure`."""
    _save(rl_figure(logs, questions, chance), path)


def plot_rl_files(files: Sequence[str | Path], path: str | Path, questions: int | None = None) -> None:
    """The same for metrics files of any runs of verl, named by their folders. Raises DataError."""
    names = [file.parent.name if file.stem == "metrics" else file.stem for file in map(Path, files)]
    titles = [name if name and names.count(name) == 1 else str(file) for name, file in zip(names, files, strict=True)]
    logs = {title: read_rl_log(file) for title, file in zip(titles, files, strict=True)}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    plot_rl_curves(logs, path, questions)


def rl_figure(logs: Mapping[str, RlLog], questions: int | None = None, chance: float | None = None) -> Figure:
    """Curves of RL runs over common steps: accuracy reward of rollouts, validation accuracy, latent reward terms.

    A panel for which no run has numbers is left out.

    Args:
        logs: title of a run -> its log.
        questions: of a whole validation, for error bars where the runs did not log it (`RlLog.validation`).
        chance: accuracy of a guess, drawn in the panel of validation.

    Raises:
        DataError: there is nothing to draw.
    """
    panels = []
    if any(log.series("groups/accuracy") for log in logs.values()):
        panels.append(_rollouts)
    if any(log.series("reward") for log in logs.values()):
        panels.append(_reward)
    if any(log.validation() for log in logs.values()):
        panels.append(lambda axis, logs: _validations(axis, logs, questions, chance))
    if any(log.series(f"reward/{term}") for log in logs.values() for term in _LATENT_TERMS):
        panels.append(_latent_terms)
    if not panels:
        raise DataError(
            f"{', '.join(logs)}: expected the metrics groups/accuracy, reward, reward/r_ctr, reward/r_div or "
            "val-core/SOURCE/acc/mean@N, found none of them. Were the runs made with a recipe such as la_dapo.yaml?"
        )
    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 4.2), sharex=True, squeeze=False)
    for axis, draw in zip(axes[0], panels, strict=True):
        draw(axis, logs)
        axis.set_xlabel("training step")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        # Below the axes: within, it would hide a curve.
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False, fontsize=8)
    figure.tight_layout()
    return figure


def _rollouts(axis: Axes, logs: Mapping[str, RlLog]) -> None:
    for i, (title, log) in enumerate(logs.items()):
        _running(axis, log.series("groups/accuracy"), title, i)
    axis.set_title(f"all rollouts (bold: mean of {WINDOW} steps)", fontsize=10)
    axis.set_ylabel("share of right answers")


def _reward(axis: Axes, logs: Mapping[str, RlLog]) -> None:
    for i, (title, log) in enumerate(logs.items()):
        _running(axis, log.series("reward"), title, i)
    axis.set_title(f"rollouts trained on (bold: mean of {WINDOW} steps)", fontsize=10)
    axis.set_ylabel("mean reward, weighted sum of terms")


def _validations(axis: Axes, logs: Mapping[str, RlLog], questions: int | None, chance: float | None) -> None:
    bars = False
    for i, (title, log) in enumerate(logs.items()):
        points = log.validation(questions)
        if not points:
            continue
        known = all(metric.stderr is not None for _, metric in points)
        errors = [100 * metric.stderr for _, metric in points] if known else None
        bars = bars or known
        steps, values = [step for step, _ in points], [100 * metric.value for _, metric in points]
        axis.errorbar(steps, values, errors, color=f"C{i}", marker=_MARKERS[i % 6], capsize=3, lw=1, label=title)
    if chance is not None:
        axis.axhline(100 * chance, color="grey", linestyle=":", label="chance")
    axis.set_title("validation, sources weighted equally" + (" (± SE)" if bars else ""), fontsize=10)
    axis.set_ylabel("accuracy, %")


def _latent_terms(axis: Axes, logs: Mapping[str, RlLog]) -> None:
    for i, (title, log) in enumerate(logs.items()):
        for term, style in _LATENT_TERMS.items():
            _running(axis, log.series(f"reward/{term}"), f"{term}, {title}", i, style)
    axis.set_title("latent reward terms of the same rollouts", fontsize=10)
    axis.set_ylabel("mean term, before its weight")


def _running(axis: Axes, points: list[tuple[int, float]], label: str, i: int, style: str = "-") -> None:
    """The values thin, their running mean bold with the run's marker; hollow on a broken line."""
    if not points:
        return
    steps, values = zip(*points, strict=True)
    parts = [values[max(0, k + 1 - WINDOW) : k + 1] for k in range(len(values))]
    axis.plot(steps, values, color=f"C{i}", linestyle=style, linewidth=0.7, alpha=0.45)
    axis.plot(
        steps,
        [sum(part) / len(part) for part in parts],
        color=f"C{i}",
        linestyle=style,
        linewidth=2,
        marker=_MARKERS[i % 6],
        markevery=(min(2 * i, len(steps) - 1), max(1, len(steps) // 8)),  # shifted, so that markers do not cover
        markerfacecolor="white" if style != "-" else None,
        label=label,
    )


def spans_as_words(text: str) -> str:
    """`<|latent_start|><|latent|>..<|latent_end|>` as `[latent x4]`."""
    return _SPAN.sub(lambda match: f"[latent x{match[1].count(LATENT)}]", text)


def plot_clips(run: Run, world: Path, path: Path, each: int = 1) -> None:
    """One answered question of each kind: the seen frames, and the response with its latent spans as markers."""
    items = json.loads((world / "futurebench.json").read_text())
    shown = []
    for question_type in ("hop1", "hop2", "hop3", "hop5"):
        shown += [s for s in run.samples if s.question_type == question_type and s.spans][:each]
    if not shown:  # a model that opens no span still gets its picture
        shown = run.samples[:4]
    figure, axes = plt.subplots(len(shown), 5, figsize=(11, 2.1 * len(shown)), width_ratios=[1, 1, 1, 1, 3.2])
    for row, sample in zip(axes.reshape(len(shown), 5), shown, strict=True):
        item = items[sample.doc_id]
        clip = read_frames(world / "videos" / item["video_path"].removeprefix("video_dataset/"), num_frames=4)
        for axis in row:
            axis.axis("off")
        for axis, frame in zip(row, clip.frames, strict=False):
            axis.imshow(frame)
        options = "  ".join(f"{letter}. {cell}" for letter, cell in item["qa"]["Options"].items())
        verdict = "right" if sample.correct else f"wrong, it is {item['qa']['Answer']}"
        lines = [*textwrap.wrap(item["qa"]["Question"], 52), options, ""]
        lines += [*textwrap.wrap(spans_as_words(sample.text), 52), f"({verdict})"]
        row[-1].text(0, 1, "\n".join(lines), va="top", fontsize=8, family="monospace", transform=row[-1].transAxes)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
