"""Latent SFT on two processes, killed while it saves: the same command ends with the weights of a run left alone.

More kills, and RL: by hand, `python scripts/check_kills.py`."""

import json
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_a_killed_run_ends_where_an_unbroken_one_does(repository, tmp_path):
    script = [sys.executable, str(repository / "scripts/check_kills.py"), "sft", str(tmp_path)]
    done = subprocess.run([*script, "--kills", "save", "--steps", "4"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    killed, last = map(json.loads, done.stdout.splitlines()[-2:])
    assert killed["kill"] == "save"
    assert last["greatest_difference"] == 0.0
