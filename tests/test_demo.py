"""The demo and the README's commands, run as a user runs them, on a world small enough for a test."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from made import opening_checkpoint

from future_l1_plugin.data.world import World


@pytest.fixture(scope="module")
def environment(repository):
    bin_dir = Path(sys.executable).parent
    return {**os.environ, "PATH": f"{bin_dir}:{os.environ['PATH']}", "VENV": str(bin_dir.parent)}


#: One step of RL in a minute; a model of two steps of SFT is right too seldom for the group filter.
SMALL_RL = (
    "data.train_batch_size=2",
    "actor_rollout_ref.actor.ppo_mini_batch_size=2",
    "data.val_max_samples=4",
    "groups.low=0",
    "groups.high=1",
)


@pytest.fixture(scope="module")
def demo(repository, environment, tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    settings = {"OUT": str(out), "TEST": "16", "TRAIN": "64", "STEPS": "2", "RL_STEPS": "1", "RL": " ".join(SMALL_RL)}
    result = subprocess.run(
        ["scripts/demo.sh"], cwd=repository, env=environment | settings, capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return out


def test_demo_writes_all_it_promises(demo):
    for name in ("table.md", "results.json", "accuracy.png", "curves.png", "rl_curves.png", "clips.png", "index.html"):
        assert (demo / name).stat().st_size > 100, name
    for name in ("latent", "text"):
        assert (demo / name / "recipe.yaml").exists() and (demo / name / "final" / "config.json").exists()
        assert list((demo / name / "tensorboard").rglob("events*"))
    results = json.loads((demo / "results.json").read_text())
    assert set(results["differences"]) == {"latent-text", "la_dapo-latent", "la_dapo-dapo"}
    numbers = results["runs"]
    assert set(numbers) == {"base", "text", "latent", "dapo", "la_dapo"}
    for run in numbers.values():
        assert 0 <= run["future_acc"]["value"] <= 1 and run["future_acc"]["stderr"] >= 0
    table = (demo / "table.md").read_text()
    assert "latent SFT" in table and "±" in table


def commands(repository, title="The same, step by step"):
    """The shell commands of the block under a title of the README, one string each."""
    text = (repository / "README.md").read_text()
    block = re.search(rf"## {title}\n\n```bash\n(.*?)```", text, re.S)[1]
    lines = [re.sub(r"\s+#.*$", "", line) for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line.strip() and not line.startswith("source ")]


def test_readme_commands(repository, environment, demo):
    """Each runs with exit code 0, in order, after the paths are pointed at the small demo."""
    found = commands(repository)
    assert [c.split()[0] for c in found] == [
        "future-l1", "future-l1", "future-l1", "future-l1", "scripts/sft.sh", "future-l1", "python", "python",
        "future-l1", "future-l1", "FUTUREBENCH_DATA=outputs/demo/world/futurebench.json",
    ]  # fmt: skip
    for command in found:
        if command.startswith(("future-l1 world", "future-l1 tiny", "future-l1 convert")):
            command = command.replace("outputs/demo/", f"{demo}/again-")  # those of the demo are there already
            command += " --test 16 --train 16" if "/again-world" in command else ""
        if command.startswith("scripts/sft.sh"):
            command = command.replace("max_steps=500", "max_steps=2")
            command += f" model={demo}/start output={demo}/by-hand data.records={demo}/world/sft.json"
            command += f" data.videos={demo}/world/videos"
        if command.startswith("python -m verl"):  # a minute each: the demo ran them
            command, _, ablation = command.partition(" +")
            script = (repository / "scripts" / "demo.sh").read_text()
            assert f"{command} out=" in script
            assert (f"rl dapo +{ablation}\n" if ablation else "rl la_dapo\n") in script
            continue
        if command.startswith("future-l1 report"):
            command = command.replace("--out outputs/", f"--out {demo}/")
        command = command.replace("outputs/demo", str(demo)).replace("outputs/eval", f"{demo}/eval")
        result = subprocess.run(
            command, shell=True, cwd=repository, env=environment, capture_output=True, text=True, timeout=300
        )
        assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}"
    assert list((demo / "eval").rglob("*_results.json"))


def test_data_commands(repository, environment, demo):
    """Those under "Data", with the micro world for DATA and the micro base in place of a server."""
    found = commands(repository, "Data")
    assert [c.split()[1] for c in found] == ["data", "curate"]
    for command in found:
        command = command.replace(" DATA", f" {demo}/world/sft.json").replace("ROOT", f"{demo}/world/videos")
        command = command.replace("checked", f"{demo}/checked").replace("curate.yaml", "curate_micro.yaml")
        if " curate " in command:
            command += f" hf.model={demo}/base output={demo}/curated rollouts.n=2 rollouts.max_new_tokens=8"
        result = subprocess.run(
            command, shell=True, cwd=repository, env=environment, capture_output=True, text=True, timeout=300
        )
        assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}"
    assert json.loads((demo / "checked" / "summary.json").read_text())["clean"] == 64
    assert (demo / "curated" / "summary.json").exists()


def test_probe_commands(repository, environment, demo):
    """Those under "Do the latents matter?": few questions, and a checkpoint that opens a span first, as after two steps
    of SFT hardly one does."""
    opening_checkpoint(demo / "latent" / "final", demo / "opens")
    for command in commands(repository, "Do the latents matter\\?"):
        command = command.replace("outputs/demo/latent/final", f"{demo}/opens").replace("outputs/demo", str(demo))
        command = command.replace("outputs/", f"{demo}/").replace("--train 256", "--train 16")
        command = command.replace("max_new_tokens=128", "max_new_tokens=24 --limit 4 --pool 4")
        result = subprocess.run(
            command, shell=True, cwd=repository, env=environment, capture_output=True, text=True, timeout=300
        )
        assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}"
    probed = json.loads((demo / "probe" / "probe.json").read_text())
    assert {"left alone", "zeroed", "swapped", "budget 0"} <= set(probed["conditions"]) and probed["retrieval"]
    assert (demo / "probe" / "probe.png").stat().st_size > 100


def test_twiffbench_commands(repository, environment, demo):
    """Those under "TwiFF-Bench": four items, answered and judged."""
    block = "\n".join(commands(repository, "TwiFF-Bench")).replace("outputs/twiffbench", f"{demo}/judged")
    block = block.replace("outputs/demo", str(demo)).replace("--twiffbench 240", "--test 16 --train 64 --twiffbench 4")
    script = f"set -e\ntrap 'kill $(jobs -p)' EXIT\n{block}".replace("8123", str(_free_port()))
    result = subprocess.run(
        ["bash", "-c", script],
        cwd=repository, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, f"{result.stdout[-2000:]}\n{result.stderr[-2000:]}"
    (judged,) = (demo / "judged").rglob("*_judged.json")
    assert json.loads(judged.read_text())["judges"]["micro-judge"]["judged"] == 4


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_full_size_sft_commands(repository, environment, demo):
    """Those under "SFT at full size", dry: GPUs are not here, and test_qwen_vl_finetune.py runs in a checkout."""
    found = commands(repository, "SFT at full size")
    assert [c.split("scripts/sft.sh ")[1].split()[0] for c in found] == [
        "recipes/sft.yaml", "recipes/sft.yaml", "recipes/sft.yaml", "recipes/ablations/sft_lambda.yaml"
    ]  # fmt: skip
    for command in found:
        command = command.replace("=DIR", "=null") + ("" if "--dry-run" in command else " --dry-run")
        command += f" model={demo}/start data.records={demo}/world/sft.json data.videos={demo}/world/videos"
        result = subprocess.run(
            command, shell=True, cwd=repository, env=environment, capture_output=True, text=True, timeout=300
        )
        assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}"
        for words in ("resolved recipe", "1 GPU: ", "8 GPUs: ", "in all: "):
            assert words in result.stdout


def test_world_files_of_the_demo(demo):
    world = World(demo / "world")
    assert len(json.loads(world.futurebench.read_text())) == 16
    assert len(json.loads(world.sft.read_text())) == 64


def test_results_in_the_readme_are_those_of_a_run(repository):
    """No number without its command: the README's results block names the models, the chance level and the seed."""
    text = (repository / "README.md").read_text()
    block = re.search(r"<!-- results:begin -->(.*?)<!-- results:end -->", text, re.S)[1]
    for words in ("micro base", "text-only SFT", "latent SFT", "chance 25", "seed"):
        assert words in block
