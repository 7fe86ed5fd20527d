"""scripts/check_gpu.py: its small form runs on a CPU; verdicts, time limits and table are what they should be."""

import json
import subprocess
import sys
from dataclasses import asdict

import pytest

from future_l1_plugin.gpu_check import PARTS, Part, runner
from future_l1_plugin.gpu_check.results import Figure, PartResult, Recorder, as_line, table

HERE = {"device": "a card", "cuda": True, "memory_gib": 80.0, "date": "2026-11-27 21:00 UTC", "commit": "0123456789abc"}
HERE |= {"versions": {"torch": "2.13.0", "vllm": None}}


@pytest.fixture
def run_code(tmp_path, monkeypatch):
    """Runs a part whose `run(results, setting)` has this body: (exit code, the part in the JSON)."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def run(body, limit=60.0):
        (tmp_path / "made_up_part.py").write_text("def run(results, setting):\n    " + body.replace("\n", "\n    "))
        part = Part("made_up_part", "made up", limit=1, small_limit=1)
        code = runner.run({"x": part}, tmp_path / "out" / "found.json", HERE, small=True, limit=limit)
        found = json.loads((tmp_path / "out" / "found.json").read_text())
        assert found | {"seconds": 0, "parts": 0} == HERE | {"size": "small", "seconds": 0, "parts": 0}
        return code, found["parts"]["x"]

    return run


@pytest.mark.parametrize(
    ("body", "code", "verdict", "reason"),
    [
        ("results.number('n', 1, most=2)", 0, "passed", ""),
        ("results.number('n', 1)", 0, "passed", ""),
        ("results.number('n', 3, most=2)\nresults.number('m', float('nan'), most=2)", 1, "failed", "n; m"),
        ("results.check('held', False)", 1, "failed", "held"),
        ("raise RuntimeError('no luck')", 1, "failed", "RuntimeError: no luck"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", 1, "failed", "its process died: signal SIGKILL"),
        ("import no_such_package.part", 0, "skipped", "needs the package no_such_package, which is not installed"),
        ("import future_l1_plugin.no_such_module", 1, "failed", "ModuleNotFoundError: No module named 'future_l1"),
        (
            "from future_l1_plugin.gpu_check.results import Skip\nraise Skip('needs a moon')",
            0,
            "skipped",
            "needs a moon",
        ),
    ],
)
def test_verdicts_and_exit_codes(run_code, capfd, body, code, verdict, reason):
    found_code, found = run_code(body)
    assert (found_code, found["verdict"]) == (code, verdict)
    assert found["reason"].startswith(reason) and bool(found["reason"]) == bool(reason)
    if "Error" in reason:
        assert "Traceback" in capfd.readouterr().err


def test_a_part_over_its_limit_is_ended_with_what_it_started_and_keeps_its_figures(run_code, tmp_path):
    body = f"""
import subprocess, sys, time
results.number('early', 5, 'ms')
child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])
open({str(tmp_path / "pid")!r}, 'w').write(str(child.pid))
time.sleep(600)""".strip()
    code, found = run_code(body, limit=3)
    assert (code, found["verdict"], found["reason"]) == (1, "failed", "ended at its time limit of 3 s")
    assert [figure["name"] for figure in found["figures"]] == ["early"] and 3 <= found["seconds"] < 20
    state = subprocess.run(["ps", "-o", "stat=", "-p", (tmp_path / "pid").read_text()], capture_output=True, text=True)
    assert state.stdout.strip() in ("", "Z", "Zs")  # gone, or not yet collected


def test_what_a_cpu_covers_otherwise_is_not_started(tmp_path):
    out = tmp_path / "found.json"
    covered = {"e": PARTS["e"]._replace(module="no_such_module")}
    assert runner.run(covered, out, HERE | {"cuda": False}, small=True) == 0
    found = json.loads(out.read_text())["parts"]["e"]
    assert found["verdict"] == "skipped"
    assert found["reason"] == "needs a CUDA device; on a CPU make test-vllm covers it"


def test_the_limits_add_up_to_eight_minutes():
    assert sum(part.limit for part in PARTS.values()) <= 480


def test_the_small_form_of_the_script(repository, tmp_path):
    """Part b, with the checkout neither installed nor the working directory. CI runs all of them by make test-gpu."""
    out = tmp_path / "found.json"
    command = [sys.executable, str(repository / "scripts" / "check_gpu.py")]
    asked = [*command, "--small", "--parts", "b", "--out", str(out)]
    done = subprocess.run(asked, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(out.read_text())
    assert set(found) == {"device", "cuda", "memory_gib", "date", "commit", "versions", "size", "seconds", "parts"}
    assert (found["size"], list(found["parts"])) == ("small", ["b"])
    part = PartResult.from_json(found["parts"]["b"])
    assert part.verdict == "passed" and sum(figure.ok is True for figure in part.figures) >= 14
    if not found["cuda"]:
        skipped = [figure for figure in part.figures if figure.value is None]
        assert len(skipped) == 7 and {figure.note for figure in skipped} == {"needs a CUDA device"}
    shown = subprocess.run([*command, "--table", str(out)], cwd=tmp_path, capture_output=True, text=True)
    assert shown.returncode == 0 and shown.stdout.count("| **passed** |") == 1


def test_the_table():
    part = PartResult("title", "failed", "b", seconds=12.3, limit=60)
    part.figures = [
        Figure("a | a", {"median": 0.0012345, "max": 1234.5}, "rad", "max at most 2000", True),
        Figure("b", 3.0, "ms", "at most 2", False),
        Figure("c", None, note="needs a CUDA device"),
        Figure("d", "yes"),
    ]
    found = HERE | {"size": "full", "seconds": 20.0, "parts": {"a": json.loads(json.dumps(asdict(part)))}}
    assert table(found).splitlines() == [
        "a card, 2026-11-27 21:00 UTC, commit 0123456789, full size; torch 2.13.0.",
        "",
        "| part | figure | value | must be | holds |",
        "|---|---|---|---|---|",
        "| a | **title** | 12 s | | **failed**: b |",
        r"| | a \| a | 0.00123 / 1234 rad (median / max) | max at most 2000 | yes |",
        "| | b | 3 ms | at most 2 | **no** |",
        "| | c | skipped: needs a CUDA device |  |  |",
        "| | d | yes |  |  |",
    ]
    assert as_line(part.figures[1]) == "NO  b: 3 ms   [at most 2]"


def test_quantiles(tmp_path):
    import torch

    results = Recorder("title", tmp_path / "part.json")
    results.spread("gap", torch.arange(101.0).flip(0), "nats", median=50, max=99)
    (figure,) = PartResult.from_json(json.loads((tmp_path / "part.json").read_text())).figures
    assert figure.value == {"median": 50.0, "99%": 99.0, "max": 100.0}
    assert (figure.rule, figure.ok) == ("median at most 50, max at most 99", False)
    with pytest.raises(ValueError, match="expected values, found none"):
        results.spread("gap", torch.zeros(0), "nats")


def test_part_a_finds_latents_that_are_off_by_one(tmp_path, monkeypatch):
    import torch

    from future_l1_plugin.gpu_check import a_precision, passes
    from future_l1_plugin.gpu_check.child import Setting
    from future_l1_plugin.gpu_check.models import TINY

    def judged():
        results = Recorder("title", tmp_path / "part.json")
        a_precision.measure(results, TINY, Setting(small=True), torch.float32, batch=2, prompt=8, tokens=20)
        return {figure.name: figure.ok for figure in results.result.figures if figure.rule}

    class Late(passes.LatentChannel):
        def feed(self, latents, *args, **kwargs):
            super().feed([z.roll(1, 0) for z in latents], *args, **kwargs)

    right = judged()
    assert len(right) == 6 and all(right.values())
    monkeypatch.setattr(passes, "LatentChannel", Late)
    wrong = judged()
    assert not wrong["float32, decoding, packed: angle of mu"]
    assert not wrong["float32, decoding, packed: text log-probability, |gap|"]


def test_the_parts_are_imported_without_hosts_and_video_readers():
    """On a machine with torch and transformers alone; what a part lacks there is for the part to say."""
    absent = ["av", "decord", "omegaconf", "ray", "verl", "vllm", "tensordict", "hydra", "peft", "rich", "matplotlib"]
    code = f"import sys, importlib; sys.modules.update(dict.fromkeys({absent}))\n"
    code += "from future_l1_plugin.gpu_check import PARTS\n"
    code += "for part in PARTS.values(): importlib.import_module(part.module)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
