"""scripts/bench_rl.py runs and fills its table. No figure is judged here: machines that run tests are busy."""

import argparse
import importlib.util
import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("verl")


@pytest.fixture(scope="module")
def bench(repository):
    spec = importlib.util.spec_from_file_location("bench_rl", repository / "scripts" / "bench_rl.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def metrics(tmp_path):
    """As verl's file logger writes it: a validation, a slow first step, two steps, the second with a checkpoint."""
    steps = [
        {"gen": 50.0, "step": 60.0},
        {"gen": 2.0, "old_log_prob": 0.5, "ref": 0.5, "update_actor": 1.5, "adv": 0.25, "step": 5.0, "testing": 9.0},
        {"gen": 3.0, "old_log_prob": 0.5, "ref": 0.5, "update_actor": 0.5, "save_checkpoint": 0.5, "step": 5.0},
    ]
    lines = [{"val-core/acc": 0.5}, *({f"timing_s/{name}": value for name, value in step.items()} for step in steps)]
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps({"step": i, "data": data}) + "\n" for i, data in enumerate(lines)))
    return file


def test_shares_of_a_step(bench, metrics):
    found = bench.shares(bench.read_steps(metrics, warm_up=1))
    expected = {"gen": 0.5, "old_log_prob": 0.1, "ref": 0.1, "update_actor": 0.2, "adv": 0.025, "save_checkpoint": 0.05}
    assert found == pytest.approx(expected | {"no timer": 0.025, "outside": 0.1})


def test_too_few_steps_are_an_error(bench, metrics):
    with pytest.raises(SystemExit, match="has 3 training steps, 3 of them are warm-up"):
        bench.read_steps(metrics, warm_up=3)


def test_import_takes_the_difference_within_a_pair(bench, monkeypatch):
    monkeypatch.setattr(bench, "import_verl", lambda policy: {"none": (3.0, 2.0), "auto": (3.5, 2.1)}[policy])
    monkeypatch.setattr(bench, "load_plugin", lambda: (0.04, 0.03))
    pairs, alone = bench.imports(argparse.Namespace(pairs=2))
    assert alone[4:] == ["0.040 s (processor: 0.030 s)", "under 0.2 s", "yes"]
    assert pairs[2:] == ["3.00 s", "3.50 s", "+0.500 s (processor: +0.100 s)", "under 0.2 s", "**no**"]


def test_the_other_parts_run(repository, metrics):
    command = [sys.executable, str(repository / "scripts" / "bench_rl.py"), "--only", "contrastive", "engine", "step"]
    command += ["--sizes", "2", "3", "2", "8", "--turns", "1", "--rollouts", "3", "--models", "micro"]
    command += ["--metrics", str(metrics), "--warm-up", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    assert [cells[0] for cells in rows] == ["| contrastive"] * 5 + ["| engine"] * 2 + ["| step"]
    assert all(len(cells) == 7 for cells in rows)
    assert "10.0% (10.0% to 10.0%)" in done.stdout
