"""SFT on several machines: torchrun's flags, arithmetic over all processes, and combinations that are refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from future_l1_plugin.data import make_world
from future_l1_plugin.errors import ConfigError
from future_l1_plugin.integrations.sft import jobs, launch
from future_l1_plugin.integrations.sft.nodes import Nodes, same_for_all

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "sft.sh"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"), test=0, train=32, seed=0, progress=False)


@pytest.fixture
def recipe(tiny_path, world, tmp_path) -> str:
    values = {
        "model": str(tiny_path),
        "output": str(tmp_path / "out"),
        "data": {"records": str(world.sft), "videos": str(world.videos), "max_length": 512},
        "train": {"batch_size": 32, "micro_batch_size": 1},
        "log": {"tensorboard": False},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    return str(tmp_path / "run.yaml")


TWO = ["--nnodes", "2", "--node-rank", "1", "--master-addr", "10.0.0.7"]


def test_the_command_on_a_node(recipe, monkeypatch):
    started = []

    def execv(program, command):
        started.append(command)
        raise SystemExit

    monkeypatch.setattr(launch.os, "execv", execv)
    for keys in (
        [*TWO, "--gpus", "8"],
        [*TWO, "--master-port", "29511", "--gpus", "1"],
        ["--nnodes", "1", "--node-rank", "0", "--gpus", "4"],
    ):
        with pytest.raises(SystemExit):
            launch.main([recipe, *keys])
    tail = ["-m", jobs.RUN, recipe]
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    found = ["--nnodes", "2", "--node-rank", "1", "--master-addr", "10.0.0.7", "--master-port"]
    assert started == [
        [*torchrun, *found, "29500", "--nproc-per-node", "8", *tail],
        [*torchrun, *found, "29511", "--nproc-per-node", "1", *tail],
        [*torchrun, "--standalone", "--nproc-per-node", "4", *tail],
    ]


def test_a_batch_is_divided_by_all_processes(recipe, capsys, monkeypatch):
    """The dry run says so, and a run that cannot be is refused before torchrun."""
    assert launch.main([recipe, *TWO, "--gpus", "8", "--dry-run", "--gpu-memory", "80"]) == 0
    said = capsys.readouterr().out
    assert "\n  16 GPUs on 2 nodes, here (node 1): " in said and "--master-addr 10.0.0.7 --master-port 29500" in said
    assert "\n  8 GPUs: " in said and "--standalone --nproc-per-node 16" not in said
    assert "\n  16 GPUs: 1 steps (1 epochs), passes of 1 on each GPU: 2 a step" in said
    assert "verdict for 16 GPUs: it fits" in said
    monkeypatch.setattr(launch.os, "execv", lambda *command: pytest.fail("a run was started"))
    assert launch.main([recipe, *TWO, "--gpus", "6"]) == 2
    assert "batch_size 32 is not a multiple of micro_batch_size 1 x 12 devices" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            (None, 1, None, None),
            r"--node-rank \(NODE_RANK\) without --nnodes \(NNODES\): each machine would train a run",
        ),
        ((None, None, "a", 1), r"--master-addr \(MASTER_ADDR\), --master-port \(MASTER_PORT\) without --nnodes"),
        ((0, None, None, None), r"--nnodes \(NNODES\): expected at least 1, found 0"),
        ((2, None, "a", None), r"\(NNODES\) 2: --node-rank \(NODE_RANK\) is missing. Say which of them this is, 0..1"),
        ((2, 0, None, None), r"\(NNODES\) 2: --master-addr \(MASTER_ADDR\) is missing. Say where all of them reach"),
        ((2, 2, "a", None), r"--node-rank \(NODE_RANK\): expected 0..1 with 2 nodes, found 2"),
        ((1, 1, None, None), r"--node-rank \(NODE_RANK\): expected 0..0 with 1 nodes, found 1"),
        ((1, None, None, 29500), r"--master-port \(MASTER_PORT\) without --master-addr"),
        ((2, 0, "a", 70000), r"--master-port \(MASTER_PORT\): expected 1..65535, found 70000"),
    ],
)
def test_bad_combinations_are_refused_with_the_reason(given, expected):
    with pytest.raises(ConfigError, match=expected):
        Nodes.of(*given)


def test_processes_that_see_another_folder_are_refused(monkeypatch):
    """`output` on a disk of one machine: one process would go on and the other begin, and they would wait for ever."""
    same_for_all("out", "no checkpoint")  # a process by itself
    monkeypatch.setattr("accelerate.utils.gather_object", lambda mine: ["out/checkpoint-4", *mine])
    with pytest.raises(
        ConfigError, match=r"in out \(process 0: out/checkpoint-4; process 1: no checkpoint\)\. Put it on"
    ):
        same_for_all("out", "no checkpoint")
    same_for_all("out", "out/checkpoint-4")


def test_nothing_is_started_by_them(recipe, capsys, monkeypatch):
    monkeypatch.setattr(launch.os, "execv", lambda *command: pytest.fail("a run was started"))
    assert launch.main([recipe, "--node-rank", "1"]) == 2
    assert launch.main([recipe, "--gpus", "0"]) == 2
    assert capsys.readouterr().err.count("error: --") == 2


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"GPUS": "8"}, "--gpus 8 r.yaml --dry-run"),
        ({"MASTER_ADDR": "a", "MASTER_PORT": "7"}, "r.yaml --dry-run"),  # of a cluster, for something else
        ({"NODE_RANK": "0"}, "--node-rank 0 r.yaml --dry-run"),  # refused
        (
            {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "7", "GPUS": "4"},
            "--gpus 4 --node-rank 0 --nnodes 2 --master-addr a --master-port 7 r.yaml --dry-run",
        ),
    ],
)
def test_the_script_passes_its_variables_on(tmp_path, variables, expected):
    """To a `python` that says what it was given."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    rest = {key: value for key, value in os.environ.items() if key not in ("GPUS", "NNODES", "NODE_RANK")}
    done = subprocess.run(
        [SCRIPT, "r.yaml", "--dry-run"],
        env=rest | {"VENV": str(tmp_path)} | variables,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["-m", "future_l1_plugin.integrations.sft.launch", *expected.split()]
