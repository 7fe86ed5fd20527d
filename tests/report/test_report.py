"""The demo's report on results that are written by hand: 8 questions, two of each kind, known answers."""

import html
import itertools
import json
import math

import matplotlib.pyplot as plt
import pytest

from future_l1_plugin import cli
from future_l1_plugin.data import make_world
from future_l1_plugin.errors import DataError
from future_l1_plugin.evaluation.probe import Outcome, ProbeResult
from future_l1_plugin.evaluation.probe_latents import Retrieval
from future_l1_plugin.evaluation.statistics import Paired
from future_l1_plugin.integrations.lmms_eval import Metric
from future_l1_plugin.report import plot_rl_files, report_demo
from future_l1_plugin.report.logs import RlLog, read_rl_log
from future_l1_plugin.report.plots import rl_figure
from future_l1_plugin.report.probe import report_probe
from future_l1_plugin.report.tables import COLUMNS, Run, Sample, paired_difference, results_table

KINDS = ["hop1", "hop2", "hop3", "hop5"] * 2
#: Which of the 8 questions a run answered right.
RIGHT = {
    "base": "10000000",
    "text": "11110000",
    "latent": "11000000",
    "dapo": "11100000",
    "la_dapo": "11111100",
}
SPAN = "<|latent_start|><|latent|><|latent|><|latent_end|>"


def write_eval(folder, right):
    """What `lmms-eval --output_path folder --log_samples` leaves."""
    folder.mkdir(parents=True)
    share = right.count("1") / len(right)
    metrics = {f"{key},none": share for key in COLUMNS} | {f"{key}_stderr_clustered,none": 0.125 for key in COLUMNS}
    (folder / "1_results.json").write_text(json.dumps({"results": {"futurebench": metrics}}))
    samples = [
        {
            "doc_id": i,
            "filtered_resps": f"<reason>r</reason>{SPAN if i < 4 else ''}<answer>A</answer>",
            "future_acc": {"score": float(mark), "question_type": kind},
        }
        for i, (mark, kind) in enumerate(zip(right, KINDS, strict=True))
    ]
    (folder / "1_samples_futurebench.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))


def rl_lines(latent, steps=12, start=0):
    """A run of verl: a validation before training and every 4 steps, rollouts in between."""
    for step in range(start, steps + 1):
        data = {}
        if step % 4 == 0:
            data |= {f"val-core/futurebench/{kind}/acc/mean@1": 0.3 + step / 40 for kind in set(KINDS)}
        if step:
            data |= {"reward": 0.5, "groups/accuracy": 0.3 + 0.02 * step, "groups/filtered": 1, "timing_s/step": 3.5}
        if step and latent:
            data |= {"reward/r_ctr": 0.4 + 0.01 * step, "reward/r_div": -0.8 + 0.01 * step}
        yield json.dumps({"step": step, "data": data}) + "\n"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world") / "world"
    make_world(root, 8, 0)
    return root


@pytest.fixture
def demo(world, tmp_path):
    """A demo folder with the runs that are asked for."""

    def demo(*names):
        out = tmp_path / "demo"
        out.mkdir()
        (out / "world").symlink_to(world)
        for name in names:
            write_eval(out / name / "eval" / "model", RIGHT[name])
        for name in {"text", "latent"} & set(names):
            rows = [{"step": i, "loss": 1.0, "ce_loss": 1 / i, "latent_loss": 2 / i} for i in (1, 10, 20)]
            (out / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            (out / name / "recipe.yaml").write_text("train: {seed: 7}\n")
        for name in {"dapo", "la_dapo"} & set(names):
            (out / name / "metrics.jsonl").write_text("".join(rl_lines(latent=name == "la_dapo")))
        return out

    return demo


def is_picture(path):
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 1000


def test_all_runs(demo, capsys):
    out = demo("base", "text", "latent", "dapo", "la_dapo")
    page = report_demo(out)
    numbers = json.loads((out / "results.json").read_text())
    assert numbers["seed"] == 7
    assert list(numbers["runs"]) == ["base", "text", "latent", "dapo", "la_dapo"]
    assert numbers["runs"]["la_dapo"]["future_acc"] == {"value": 0.75, "stderr": 0.125}
    # la_dapo - latent: four 1s, four 0s: mean 1/2, variance 8 * 1/4 / 7, over 8 questions.
    assert set(numbers["differences"]) == {"latent-text", "la_dapo-latent", "la_dapo-dapo"}
    assert numbers["differences"]["la_dapo-latent"] == pytest.approx({"value": 0.5, "stderr": math.sqrt(2 / 7 / 8)})
    # la_dapo - dapo: three 1s: mean 3/8, variance (3 * (5/8)^2 + 5 * (3/8)^2) / 7 = 1.875 / 7.
    assert numbers["differences"]["la_dapo-dapo"] == pytest.approx({"value": 0.375, "stderr": math.sqrt(1.875 / 56)})
    # latent - text: two -1s: mean -1/4, variance (2 * (3/4)^2 + 6 * (1/4)^2) / 7 = 1.5 / 7.
    assert numbers["latent_minus_text"] == pytest.approx({"value": -0.25, "stderr": math.sqrt(1.5 / 56)})
    assert numbers["latent_minus_text"] == numbers["differences"]["latent-text"]

    table = (out / "table.md").read_text()
    assert f"| latent SFT + LA-DAPO | {' | '.join(['75.0 ± 12.5'] * len(COLUMNS))} | 0.50 | 1.00 |" in table
    assert "| latent SFT + DAPO, no latent terms | 37.5 ± 12.5 |" in table
    note = table.strip().splitlines()[-1]
    assert "8 held-out questions" in note and "chance 25. Training seed 7." in note
    assert "Latent minus text-only on the same questions: -25.0 ± 16.4 points." in note
    assert "LA-DAPO minus its start, latent SFT: 50.0 ± 18.9 points." in note
    assert "LA-DAPO minus DAPO without latent terms: 37.5 ± 18.3 points." in note
    for name in ("accuracy", "curves", "rl_curves", "clips"):
        assert is_picture(out / f"{name}.png")
        assert f"{name}.png" in page.read_text()
    assert "weighted equally" in page.read_text() and html.escape(note) in page.read_text()
    printed = " ".join(capsys.readouterr().out.split())
    assert "LA-DAPO" in printed and "37.5 ± 18.3" in printed and "…" not in printed  # on 80 columns


def test_sft_only(demo):
    """Users without RL get the page as it was."""
    out = demo("base", "text", "latent")
    page = report_demo(out).read_text()
    numbers = json.loads((out / "results.json").read_text())
    assert set(numbers["runs"]) == {"base", "text", "latent"} and set(numbers["differences"]) == {"latent-text"}
    assert not (out / "rl_curves.png").exists() and "einforcement" not in page
    assert (out / "table.md").read_text().endswith(
        "accuracy in percent ± standard error, chance 25. Training seed 7. Latent minus text-only on the same "
        "questions: -25.0 ± 16.4 points.\n"
    )  # fmt: skip


@pytest.mark.parametrize(("name", "pairs"), [("la_dapo", {"latent-text", "la_dapo-latent"}), ("dapo", {"latent-text"})])
def test_one_rl_run(demo, name, pairs):
    out = demo("base", "text", "latent", name)
    report_demo(out)
    assert set(json.loads((out / "results.json").read_text())["differences"]) == pairs
    assert is_picture(out / "rl_curves.png")


def test_a_started_rl_run_without_an_evaluation(demo):
    out = demo("base", "text", "latent")
    (out / "dapo").mkdir()
    with pytest.raises(DataError, match=r"dapo/eval: no \*_results.json"):
        report_demo(out)


def test_an_evaluated_rl_run_without_metrics(demo):
    out = demo("base", "text", "latent", "dapo")
    (out / "dapo" / "metrics.jsonl").unlink()
    with pytest.raises(DataError, match=r"dapo/metrics.jsonl: no such file"):
        report_demo(out)


@pytest.mark.parametrize("missing", ["base", "text", "latent"])
def test_sft_runs_stay_required(demo, missing):
    out = demo(*({"base", "text", "latent", "la_dapo"} - {missing}))
    with pytest.raises(DataError, match=f"{missing}/eval"):
        report_demo(out)


def test_cost_of_a_run():
    """Two samples of 3 and 5 tokens and 0.5 and 1.5 seconds, one right: 1 s/sample, 0.5 correct/s."""
    timed = [Sample(i, "hop1", i == 0, SPAN, tokens=3 + 2 * i, seconds=0.5 + i) for i in range(2)]
    metrics = dict.fromkeys(COLUMNS, Metric(0.5, None))
    header, (row, old) = results_table(
        {
            "a": Run("a", "a", metrics, timed),
            "b": Run("b", "b", metrics, [Sample(0, "hop1", True, SPAN, tokens=7), timed[1]]),
        }
    )
    cost = dict(zip(header, row, strict=True))
    assert [cost[name] for name in ("spans", "latents", "tokens", "s/sample", "correct/s")] == [
        "1.00", "2.00", "4.0", "1", "0.5",
    ]  # fmt: skip
    assert old[-2:] == ["-", "-"]  # a log of an earlier version


def test_probe_tables(tmp_path, capsys):
    def outcome(name, right, against=None):
        samples = [Sample(i, "hop1", mark == "1", SPAN) for i, mark in enumerate(right)]
        return Outcome(
            name, Metric(right.count("1") / len(right), 0.1), against, None if against is None else 3, samples
        )

    spoilt = outcome("zeroed", "1000", Paired(4, -0.25, 0.125, gained=1, lost=2))
    hop = {"question_type": "all", "responses": 4, "spans": 1.0, "latents": 2.0, "text_tokens": 3.5}
    hops = [hop | {"adjacent_cosine": None, "two_spans": 0}]
    found = Retrieval(9, 3, 16, Metric(0.5, 0.125), 1 / 16, Metric(0.25, None), 0.2)
    report_probe(ProbeResult([outcome("left alone", "1100"), spoilt], hops, found, {"hash": "x"}), tmp_path)
    table = (tmp_path / "probe.md").read_text()
    assert "| left alone | 50.0 ± 10.0 | - | - | - | - | - | 2.00 |" in table
    assert "| zeroed | 25.0 ± 10.0 | -25.0 ± 12.5 | -49.5 to -0.5 | 1 | 2 | 3 | 2.00 |" in table
    assert "| all | 4 | 1.00 | 2.00 | 3.50 | - |" in table
    assert "nearest of 16 in 50.0 ± 12.5% (chance 6.2), of its clip's frames in 25.0% (chance 20.0)" in table
    assert table in capsys.readouterr().out and is_picture(tmp_path / "probe.png")
    numbers = json.loads((tmp_path / "probe.json").read_text())
    assert numbers["conditions"]["zeroed"]["against"]["lost"] == 2 and numbers["retrieval"]["spans"] == 9


def test_paired_difference_needs_the_same_questions():
    def run(name, ids):
        return Run(name, name, {}, [Sample(i, "hop1", True, "") for i in ids])

    with pytest.raises(DataError, match="la_dapo and dapo: expected evaluations on the same questions"):
        paired_difference(run("la_dapo", [0, 1]), run("dapo", [0, 1, 2]))
    with pytest.raises(DataError, match="same questions"):
        paired_difference(run("la_dapo", [0, 1]), run("dapo", [0, 2]))
    one = paired_difference(run("a", [0]), run("b", [0]))
    assert (one.value, one.stderr) == (0.0, None)


# -- curves ------------------------------------------------------------------------------------------------------------


def log(tmp_path, latent):
    path = tmp_path / f"{latent}.jsonl"
    path.write_text("".join(rl_lines(latent)))
    return read_rl_log(path)


@pytest.fixture
def figure():
    made = []

    def figure(*args, **kwargs):
        made.append(rl_figure(*args, **kwargs))
        return made[-1]

    yield figure
    for one in made:
        plt.close(one)


def test_four_panels(tmp_path, figure):
    shown = figure({"DAPO": log(tmp_path, False), "LA-DAPO": log(tmp_path, True)}, questions=120, chance=0.25)
    rollouts, reward, validation, terms = shown.axes
    assert list(reward.lines[0].get_ydata()) == [0.5] * 12
    assert all(
        axes.get_title() and axes.get_xlabel() and axes.get_ylabel() and axes.get_legend() for axes in shown.axes
    )
    assert [text.get_text() for text in rollouts.get_legend().get_texts()] == ["DAPO", "LA-DAPO"]
    assert [text.get_text() for text in terms.get_legend().get_texts()] == ["r_ctr, LA-DAPO", "r_div, LA-DAPO"]
    thin, bold, *others = rollouts.lines
    assert len(others) == 2 and thin.get_linewidth() < bold.get_linewidth()
    assert bold.get_marker() != others[1].get_marker()  # told apart in grey
    assert list(thin.get_xdata()) == list(bold.get_xdata()) == list(range(1, 13))
    assert thin.get_ydata() == pytest.approx([0.3 + 0.02 * step for step in range(1, 13)])
    # The mean of this step and up to four before it: a line of slope .02 is two steps behind.
    assert bold.get_ydata()[[0, 1, 2]] == pytest.approx([0.32, 0.33, 0.34])
    assert bold.get_ydata()[4:] == pytest.approx([0.3 + 0.02 * (step - 2) for step in range(5, 13)])
    points = validation.containers[0].lines[0]
    assert list(points.get_xdata()) == [0, 4, 8, 12]
    assert points.get_ydata() == pytest.approx([30, 40, 50, 60])
    segment = validation.containers[0].lines[2][0].get_segments()[0]  # .3 of 4 sources with 30 questions each
    assert segment[1][1] - segment[0][1] == pytest.approx(2 * 100 * math.sqrt(0.3 * 0.7 / 120))
    assert "weighted equally" in validation.get_title() and "SE" in validation.get_title()
    assert len({axes.get_xlim() for axes in shown.axes}) == 1


def test_nothing_is_cut_off(tmp_path, figure):
    titles = ("latent SFT + DAPO, no latent terms", "latent SFT + LA-DAPO")
    shown = figure({title: log(tmp_path, i == 1) for i, title in enumerate(titles)}, questions=120, chance=0.25)
    renderer = shown.canvas.get_renderer()
    boxes = [axes.get_tightbbox(renderer) for axes in shown.axes]
    assert all(shown.bbox.x0 <= box.x0 and box.x1 <= shown.bbox.x1 for box in boxes)
    assert all(shown.bbox.y0 <= box.y0 and box.y1 <= shown.bbox.y1 for box in boxes)
    assert all(left.x1 <= right.x0 for left, right in itertools.pairwise(boxes))


def test_panels_without_numbers_are_left_out(tmp_path, figure):
    without_error = figure({"DAPO": log(tmp_path, False)})
    assert len(without_error.axes) == 3 and "SE" not in without_error.axes[2].get_title()
    assert not without_error.axes[2].containers[0].has_yerr
    assert len(figure({"run": RlLog({1: {"groups/accuracy": 0.5}})}).axes) == 1
    with pytest.raises(DataError, match=r"run: expected the metrics groups/accuracy.*found none"):
        figure({"run": RlLog({1: {"critic/score/mean": 0.5}})})


def test_seven_runs_and_one_step(figure):
    assert len(figure({str(i): RlLog({1: {"groups/accuracy": 0.1 * i}}) for i in range(7)}).axes[0].lines) == 14


def test_files_of_any_runs(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("future_l1_plugin.report.plots._save", lambda figure, path: drawn.append((figure, path)))
    files = [tmp_path / "a" / "metrics.jsonl", tmp_path / "b" / "metrics.jsonl", tmp_path / "third.jsonl"]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(rl_lines(latent=True)))
    plot_rl_files(files, tmp_path / "new" / "curves.png")
    figure, path = drawn[0]
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["a", "b", "third"]
    assert path == tmp_path / "new" / "curves.png" and path.parent.is_dir()
    plot_rl_files([files[0], files[0]], path)
    assert len(drawn[1][0].axes[0].get_legend().get_texts()) == 1  # the same file twice is one run
    for figure, _ in drawn:
        plt.close(figure)


# -- command line ------------------------------------------------------------------------------------------------------


def test_command_line(demo, tmp_path, capsys):
    out = demo("base", "text", "latent", "la_dapo")
    assert cli.main(["report", str(out), "--val-questions", "120"]) == 0
    assert "latent SFT" in capsys.readouterr().out
    picture = tmp_path / "curves.png"
    assert cli.main(["report", "--rl", str(out / "la_dapo" / "metrics.jsonl"), "--out", str(picture)]) == 0
    assert is_picture(picture)
    capsys.readouterr()
    assert cli.main(["report", "--rl", str(out / "text" / "metrics.jsonl"), "--out", str(picture)]) == 2
    assert "expected a line of verl's file logger" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["x", "--rl", "y", "--out", "z"], ["--rl", "y"], ["x", "--out", "z"]])
def test_command_line_takes_one_form_or_the_other(words, capsys):
    assert cli.main(["report", *words]) == 2
    assert "expected either FOLDER, or --rl" in capsys.readouterr().err
