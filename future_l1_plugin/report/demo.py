"""What `make demo` shows at its end: a table with standard errors, pictures, and a page that holds both.

Written to the demo's folder: table.md, results.json, accuracy.png, curves.png, clips.png, index.html; and rl_curves.png
if there is a folder of an RL run.
"""

import html
import json
from collections.abc import Mapping
from pathlib import Path

from future_l1_plugin.evaluation.statistics import Metric
from future_l1_plugin.report.logs import read_rl_log
from future_l1_plugin.report.plots import plot_accuracy, plot_clips, plot_curves, plot_rl_curves
from future_l1_plugin.report.tables import COLUMNS, Run, markdown, paired_difference, percent, read_run, results_table

#: Folder of a run -> its title, in the order of the table.
TITLES = {"base": "micro base", "text": "text-only SFT", "latent": "latent SFT"}
#: Those of RL runs, both started from `latent`. A run without a folder is left out.
RL_TITLES = {"dapo": "latent SFT + DAPO, no latent terms", "la_dapo": "latent SFT + LA-DAPO"}
#: (run, run it is compared with) -> how the note says it.
DIFFERENCES = {
    ("latent", "text"): "Latent minus text-only on the same questions",
    ("la_dapo", "latent"): "LA-DAPO minus its start, latent SFT",
    ("la_dapo", "dapo"): "LA-DAPO minus DAPO without latent terms",
}
CHANCE = 0.25


def report_demo(folder: str | Path, val_questions: int | None = None) -> Path:
    """Write the report of a finished demo and print its table. Returns the page's path.

    Args:
        folder: of the demo.
        val_questions: of a validation of the RL runs, for error bars where the runs did not log it.

    Raises:
        DataError: an evaluation did not finish, or an RL run left no metrics.
    """
    out = Path(folder)
    rl = {name: title for name, title in RL_TITLES.items() if (out / name).is_dir()}
    runs = {name: read_run(name, title, out / name / "eval") for name, title in (TITLES | rl).items()}
    rl_logs = {title: read_rl_log(out / name / "metrics.jsonl") for name, title in rl.items()}
    header, rows = results_table(runs)
    differences = {
        pair: paired_difference(*(runs[name] for name in pair)) for pair in DIFFERENCES if runs.keys() >= set(pair)
    }
    seed = _seed(out)
    note = (
        f"FutureBench schema on the micro world, {len(runs['base'].samples)} held-out questions, accuracy in percent "
        f"± standard error, chance {100 * CHANCE:.0f}. Training seed {seed}. "
    )
    note += " ".join(f"{DIFFERENCES[pair]}: {percent(metric)} points." for pair, metric in differences.items())
    (out / "table.md").write_text(markdown(header, rows) + "\n" + note + "\n")
    (out / "results.json").write_text(json.dumps(_numbers(runs, differences, seed), indent=1) + "\n")
    plot_accuracy(runs, out / "accuracy.png")
    plot_curves({runs[name].title: out / name / "metrics.jsonl" for name in ("text", "latent")}, out / "curves.png")
    if rl_logs:
        plot_rl_curves(rl_logs, out / "rl_curves.png", val_questions, CHANCE)
    plot_clips(runs["latent"], out / "world", out / "clips.png")
    page = out / "index.html"
    page.write_text(_page(header, rows, note, with_rl=bool(rl_logs)))
    _print(header, rows, note, page)
    return page


def _seed(out: Path) -> int | str:
    from omegaconf import OmegaConf

    recipe = out / "latent" / "recipe.yaml"
    return OmegaConf.load(recipe).train.seed if recipe.exists() else "?"


def _numbers(runs: Mapping[str, Run], differences: Mapping[tuple[str, str], Metric], seed: int | str) -> dict:
    def number(metric: Metric) -> dict:
        return {"value": metric.value, "stderr": metric.stderr}

    return {
        "seed": seed,
        "runs": {name: {key: number(run.metrics[key]) for key in COLUMNS} for name, run in runs.items()},
        "latent_minus_text": number(differences["latent", "text"]),
        "differences": {f"{run}-{other}": number(metric) for (run, other), metric in differences.items()},
    }


#: Under the picture of the RL runs.
_RL_CAPTION = (
    "RL runs start from latent SFT. Share of right answers: over all rollouts of a step, also of groups that were then "
    "filtered out as too easy or too hard. Reward: over the rollouts that were trained on. Validation is on a part of "
    "the held-out questions: the mean over the kinds of question, each weighted equally. Latent terms are drawn for "
    "runs that have them."
)


def _page(header: list[str], rows: list[list[str]], note: str, with_rl: bool) -> str:
    def line(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    table = line(header, "th") + "".join(line(row, "td") for row in rows)
    shown = [
        ("Accuracy by kind of question", "accuracy.png", ""),
        ("Training", "curves.png", ""),
        ("Reinforcement learning", "rl_curves.png", _RL_CAPTION),
        ("Some answers of the latent model", "clips.png", ""),
    ]
    pictures = "".join(
        f"<h2>{title}</h2><img src='{file}' alt='{title}'>" + (f"<p>{caption}</p>" if caption else "")
        for title, file, caption in shown
        if with_rl or file != "rl_curves.png"
    )
    style = "body{font:16px sans-serif;margin:2em auto;max-width:70em}td,th{padding:.3em .8em;text-align:right}"
    style += "td:first-child,th:first-child{text-align:left}img{max-width:100%}"
    return (
        f"<!doctype html><meta charset='utf-8'><title>Future-L1 demo</title><style>{style}</style>"
        f"<h1>Future-L1 on the micro world</h1><table>{table}</table><p>{html.escape(note)}</p>{pictures}\n"
    )


def _print(header: list[str], rows: list[list[str]], note: str, page: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(padding=(0, 1 if console.width >= 100 else 0))  # on 80 columns padding would cut names short
    for title in header:
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(note)
    console.print(f"page: {page}")
