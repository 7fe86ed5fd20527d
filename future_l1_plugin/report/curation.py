"""The picture of a curation: what the future frames are worth to the base model, and what was taken."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from future_l1_plugin.data.curation import Curated, class_of
from future_l1_plugin.data.curation_answers import Score


def print_curation(curated: Curated, output: str | Path) -> None:
    """A short table on the terminal, and what fell short of the recipe."""
    from rich.console import Console
    from rich.table import Table

    found, console = curated.summary, Console()
    table = Table(title=f"{found['records']:,} records, {found['answers']:,} answers", title_justify="left")
    for column in ("file", "records", "mean gain"):
        table.add_column(column, justify="left" if column == "file" else "right")
    table.add_row("(all)", f"{found['records']:,}", f"{found['mean_gain']['all']:.2f}")
    for name in ("sft", "random"):
        gain = found["mean_gain"].get(name)
        table.add_row(f"{name}.jsonl", f"{found['selected'][name]:,}", "-" if gain is None else f"{gain:.2f}")
    for size in found["selected"]["rl"]:
        table.add_row(f"rl_{size}.jsonl", f"{size:,}", "-")
    console.print(table)
    text, visual = found["accuracy"]["text"], found["accuracy"]["visual"]
    console.print(f"right answers: {text:.1%} without the future frames, {visual:.1%} with them")
    if found["undecided_counted_wrong"]:
        console.print(
            f"[bold]{found['undecided_counted_wrong']:,} answers were decided by no rule and count as wrong.[/] "
            "Name a judge in the recipe: judge={base_url: .., model: ..}"
        )
    for note in found["notes"]:
        console.print(note)
    console.print(f"{output}: the files above, summary.json, curation.png")


def plot_curation(curated: Curated, n: int, output: str | Path) -> None:
    """Histogram of the gain, p_t against p_v, shares of classes if there are several; all records, selection, control.

    Written to `output`/curation.png. `n`: answers to a question.
    """
    scores, selected = curated.scores, curated.selected
    names = sorted({class_of(score.record) for score in scores})
    classified = len(names) > 1
    figure, panels = plt.subplots(1, 2 + classified, figsize=(13 if classified else 10, 3.8))
    gains, grid = panels[:2]
    groups = {"all records": scores, "selected": selected.sft, "random control": selected.random}

    steps = np.arange(-n, n + 1)
    for (name, group), shift in zip(groups.items(), (-0.27, 0.0, 0.27), strict=True):
        if group:
            found = Counter(score.gain for score in group)
            gains.bar(steps + shift, [100 * found[g] / len(group) for g in steps], 0.27, label=name)
    gains.set_xlabel(f"gain: right answers of {n} with the future frames, minus without")
    gains.set_ylabel("share of records, %")
    gains.xaxis.set_major_locator(MaxNLocator(integer=True))
    gains.legend(frameon=False)

    counts = np.zeros((n + 1, n + 1))
    for score in scores:
        counts[score.visual, score.text] += 1
    image = grid.imshow(counts, origin="lower", cmap="Blues")
    taken = {(score.text, score.visual) for score in selected.sft}
    if taken:
        grid.scatter(*zip(*sorted(taken), strict=True), s=14, color="tab:orange", label="selected from")
        grid.legend(loc="lower right", frameon=False)
    grid.set_xlabel(f"right without future frames, of {n}")
    grid.set_ylabel(f"right with them, of {n}")
    figure.colorbar(image, ax=grid, label="records")

    if classified:
        _plot_classes(panels[2], groups, names)
    figure.tight_layout()
    figure.savefig(Path(output) / "curation.png", dpi=120)
    plt.close(figure)


def _plot_classes(axes: Axes, groups: Mapping[str, Sequence[Score]], names: Sequence[str]) -> None:
    height = 0.27
    for (name, group), shift in zip(groups.items(), (-height, 0.0, height), strict=True):
        if group:
            found = Counter(class_of(score.record) for score in group)
            axes.barh(np.arange(len(names)) + shift, [100 * found[c] / len(group) for c in names], height, label=name)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("share of records by class, %")
